"""Which tars there are at a place: a folder here, one in an object store, or a pattern with braces."""

import hashlib
import os
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import braceexpand
from pydantic import ValidationError

from . import storage
from .manifest import Shard
from .sources import own_shards, walk
from .tars import COMPRESSED, compressed


class Tars(NamedTuple):
    """Where tars lie."""

    root: str
    """Folder or URL."""
    files: dict[str, tuple[int, int] | None]
    """(bytes, time of its last change in ns) of each, by its name below the root, sorted; None for remote ones."""

    @property
    def digest(self) -> str:
        """sha256 in hex of names and sizes."""
        listed = [(name, file and file[0]) for name, file in self.files.items()]
        return hashlib.sha256(repr(listed).encode()).hexdigest()


def find_tars(src: str) -> Tars:
    """The tars of a folder or a place like one, or those that a pattern with braces names.

    Raises ValueError if there are none, or compressed ones, OSError if a remote place cannot be listed.
    """
    if src.startswith("pipe:"):
        raise ValueError(f"{src} is a command: a manifest does not name commands; give a folder or a URL")
    remote = storage.is_remote(src)
    path = Path() if remote else storage.local_path(src).absolute()
    if "{" in src and (remote or not path.exists()):
        root, names = _split(_expand(src if remote else f"{path}"))
    elif remote:
        one = src.partition("?")[0].lower().endswith((".tar", *COMPRESSED))
        root, names = _split([src]) if one else (src.rstrip("/"), list(storage.listing(src, "")))
    elif path.is_dir():
        root, names = f"{path}", walk(path)
        if own_shards(path, names) is not None:
            raise ValueError(f"{path} is a data set of styleloom prepare: it is indexed, train from it as it is")
    elif path.exists():
        root, names = f"{path.parent}", [path.name]
    else:
        raise ValueError(f"there is no {path} to take tars from")
    names = sorted(name for name in names if name.lower().endswith((".tar", *COMPRESSED)))
    for name in names:
        _check_name(name, root)
    if not names:
        raise ValueError(f"no tars in {storage.shown(src) if remote else src}: --index-only is for WebDataset tars")
    return Tars(root, {name: None if remote else _file(storage.join(root, name)) for name in names})


def _file(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _expand(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"{pattern}: {error}") from None


def _split(places: list[str]) -> tuple[str, list[str]]:
    """The folder that all places are below, and their names in it. Of URLs, the query goes with the folder."""
    paths, queries = [], set()
    for place in places:
        path, mark, query = place.partition("?") if storage.is_remote(place) else (place, "", "")
        paths.append(path)
        queries.add(mark + query)
    folders = [path.split("/")[:-1] for path in paths]
    levels = enumerate(zip(*folders, strict=False))
    shared = next((i for i, parts in levels if len(set(parts)) > 1), min(map(len, folders)))
    root = "/".join(folders[0][:shared])
    if len(queries) > 1 or root.endswith(("/", ":")) or not root:
        raise ValueError(f"{places[0]} and the others are not below one folder, or are signed one by one")
    names = [path[len(root) + 1 :] for path in paths]
    if root.lower().startswith(("http:", "https:")):
        names = [urllib.parse.unquote(name) for name in names]  # storage.join quotes them
    return root + queries.pop(), names


def _check_name(name: str, root: str) -> None:
    tool = next((tool for suffix, tool in COMPRESSED.items() if name.lower().endswith(suffix)), None)
    if tool:
        raise ValueError(compressed(storage.join(root, name), tool))
    try:
        Shard(name=name, count=1, bytes=1024, sha256="0" * 64, index=f"{name}.npy", index_sha256="0" * 64)
    except ValidationError:
        raise ValueError(f"{name!r} in {root} cannot be named in a manifest: rename it") from None
