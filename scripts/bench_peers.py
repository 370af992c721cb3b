"""The libraries beside which `styleloom bench data` measures ours: each gets the same encoded images in its own form.

Of each there is the raw stream (bytes and labels), the full stream as its documentation has it, and the full stream
with the decoder that ours has and its images stacked channels last, so that not the decoders are compared.
"""

import functools
import importlib
import importlib.util
import io
import itertools
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from styleloom.datasets.decode import decode_into, decoders
from styleloom.datasets.manifest import Manifest, load_index
from styleloom.datasets.stream import batches

OURS, ZIP = "styleloom", "zip"
MODULES = {"webdataset": "webdataset", ZIP: "zipfile", "mosaicml-streaming": "streaming", "litdata": "litdata"}
LIBRARIES = (
    "webdataset", "mosaicml-streaming", "litdata", "simplejpeg", "kornia-rs", "imagecodecs", "pyspng", "Pillow",
    "torchvision", "numpy",
)  # fmt: skip

Decode = Callable[[bytes], Any]
Collate = Callable[[list[tuple[Any, int]]], Any]


@dataclass(frozen=True)
class Images:
    """The images that all have to deliver."""

    folder: Path
    """Our data set."""
    manifest: Manifest
    batch: int
    passes: int
    """How often a measurement goes through them at most."""
    work: Path
    """For the other libraries' sets."""

    @functools.cached_property
    def rows(self) -> list[tuple[str, int, int, int]]:
        """(tar, offset of the image in it, its length, label) of each."""
        return [
            (str(self.folder / shard.name), *row[:3])
            for shard in self.manifest.shards
            for row in load_index(self.folder, shard).tolist()
        ]

    @functools.cached_property
    def data(self) -> list[bytes]:
        """Each, encoded."""
        return [read(*row[:3]) for row in self.rows]

    @property
    def labels(self) -> list[int]:
        return [row[3] for row in self.rows]


@dataclass(frozen=True)
class Contender:
    """One way to do a stage of the work."""

    stage: str
    """decode (from bytes in memory), raw (stream) or full (stream)."""
    library: str
    decoder: str
    start: Callable[[int], Iterator[Any]]
    """Number of batches -> at least so many."""


def read(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def versions() -> dict[str, str]:
    """Of those libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def missing(name: str) -> str | None:
    """Why a library cannot be measured here; None if it can."""
    try:
        importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        return f"not installed: pip install {name}" if error.name == MODULES[name] else f"it lacks {error.name}"
    except Exception as error:  # whatever it says of another library's version
        return f"it cannot be imported: {error}"
    return None


# Decoders: bytes -> uint8 [H, W, C], or a tensor [C, H, W].


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def by_torchvision(data: bytes) -> torch.Tensor:
    io_ = importlib.import_module("torchvision.io")
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return io_.decode_image(encoded, io_.ImageReadMode.RGB)


def by_pyspng(data: bytes) -> np.ndarray:
    return importlib.import_module("pyspng").load(data)


def planes(decode: Decode) -> Decode:
    """[C, H, W] of what decodes to [H, W, C], as a view."""
    return lambda data: torch.from_numpy(decode(data)).permute(2, 0, 1)


def fast(images: Images) -> tuple[str, Decode]:
    """The name and the function of the decoder that our stream uses, into fresh memory."""
    codec, shape = images.manifest.codec, (images.manifest.height, images.manifest.width, images.manifest.channels)
    if codec == "jpeg":
        return "simplejpeg", simplejpeg.decode_jpeg

    def decode(data: bytes) -> np.ndarray:
        out = np.empty(shape, np.uint8)
        decode_into(out, data, codec)
        return out

    return decoders()[codec], decode


def others(codec: str) -> dict[str, Decode]:
    """Decoders of a codec that people use, of those that are installed."""
    found: dict[str, Decode] = {"Pillow": by_pillow}
    if has("torchvision"):
        found["torchvision"] = by_torchvision
    if codec == "png" and has("pyspng"):
        found["pyspng"] = by_pyspng
    return found


def has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


# Samples -> a batch.


def bytes_as_they_are(samples: list[tuple[Any, int]]) -> tuple[list[Any], torch.Tensor]:
    data, labels = zip(*samples, strict=True)
    return list(data), torch.tensor(labels)


def channels_last(samples: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [n, C, H, W] of arrays [H, W, C], and labels."""
    pixels, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


# The contenders.


def decoding(images: Images) -> list[Contender]:
    """Decoders in a loop over bytes in memory. Streams are held against ours, into one array again and again."""
    m = images.manifest
    out = np.empty((m.height, m.width, m.channels), np.uint8)
    ways: dict[tuple[str, str], Decode] = {
        (OURS, decoders()[m.codec]): lambda data: decode_into(out, data, m.codec),
        **{("", name): decode for name, decode in others(m.codec).items()},
    }
    if m.codec == "jpeg":
        ways["", "simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, buffer=out)

    def start(decode: Decode, n: int) -> Iterator[Any]:
        endless = itertools.cycle(images.data)
        for _ in range(n):
            for data in itertools.islice(endless, images.batch):
                decode(data)
            yield None

    return [Contender("decode", *names, functools.partial(start, decode)) for names, decode in ways.items()]


def streaming(images: Images, peers: Sequence[str]) -> list[Contender]:
    """Ours and those named, each with its raw stream and its full ones."""
    found = []
    for stage, decode in (("raw", False), ("full", True)):
        start = functools.partial(_ours, images, decode)
        found.append(Contender(stage, OURS, decoders()[images.manifest.codec] if decode else "", start))
    name, quick = fast(images)
    for peer in peers:
        open_, usual = PEERS[peer](images)
        found.append(Contender("raw", peer, "", functools.partial(open_, lambda data: data, bytes_as_they_are)))
        found += [Contender("full", peer, *each) for each in usual.items()]
        found.append(Contender("full", peer, f"{name}, stacked", functools.partial(open_, quick, channels_last)))
    return found


def _ours(images: Images, decode: bool, n: int) -> Iterator[Any]:
    return batches(images.folder, images.manifest, seed=0, start=0, batch=images.batch, decode=decode)


Open = Callable[[Decode, Collate, int], Iterator[Any]]
"""(decoder, collation, number of batches) -> at least so many."""
Usual = dict[str, Callable[[int], Iterator[Any]]]
"""Name of the decoder -> the full stream as the library's documentation has it."""


def open_webdataset(images: Images) -> tuple[Open, Usual]:
    """Plain webdataset on the very tars, shuffled in a buffer of 1000 samples, which is full before the first one."""
    library: Any = importlib.import_module("webdataset")
    codec, urls = images.manifest.codec, [str(images.folder / shard.name) for shard in images.manifest.shards]

    count = images.manifest.count

    def samples(batches: int) -> Any:
        # Repeated before they are batched, or every epoch would end in a smaller batch.
        tars = urls * (math.ceil(batches * images.batch / count) + 1)
        buffer = min(1000, count)
        return library.WebDataset(tars, shardshuffle=len(tars)).shuffle(buffer, initial=buffer)

    fields = (codec, "cls;__key__")  # where there is no label, something of the kind

    def open_(decode: Decode, collate: Collate, n: int) -> Iterator[Any]:
        pipeline = samples(n).to_tuple(*fields).map_tuple(decode, int).batched(images.batch, collation_fn=collate)
        return iter(pipeline)

    def usual(n: int) -> Iterator[Any]:
        return iter(samples(n).decode("torchrgb8").to_tuple(*fields).batched(images.batch))

    return open_, {"Pillow": usual}


class Zip(Dataset):
    """Images in a zip, read at random, as StyleGAN's training programs do."""

    def __init__(self, path: Path, labels: Sequence[int], decode: Decode) -> None:
        self.archive, self.labels, self.decode = zipfile.ZipFile(path), labels, decode
        self.names = sorted(self.archive.namelist())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        with self.archive.open(self.names[i]) as file:
            return self.decode(file.read()), self.labels[i]


def open_zip(images: Images) -> tuple[Open, Usual]:
    """A zip with stored images, random access and a DataLoader."""
    path = images.work / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, data in enumerate(images.data):
            archive.writestr(f"{i:08d}.{images.manifest.codec}", data)

    def open_(decode: Decode, collate: Collate, n: int) -> Iterator[Any]:
        dataset = Zip(path, images.labels, decode)
        sampler = RandomSampler(dataset, num_samples=n * images.batch)
        return iter(DataLoader(dataset, images.batch, sampler=sampler, collate_fn=collate))

    ways = {"pyspng": by_pyspng} if images.manifest.codec == "png" and has("pyspng") else {"Pillow": by_pillow}
    return open_, {name: functools.partial(open_, planes(way), default_collate) for name, way in ways.items()}


def open_mosaic(images: Images) -> tuple[Open, Usual]:
    """mosaicml-streaming: MDS shards of bytes and labels, an epoch as long as is needed, a DataLoader."""
    library: Any = importlib.import_module("streaming")
    path = str(images.work / "mds")
    with library.MDSWriter(out=path, columns={"image": "bytes", "label": "int"}) as writer:
        for data, label in zip(images.data, images.labels, strict=True):
            writer.write({"image": data, "label": label})

    class Decoding(library.StreamingDataset):
        decode: Decode

        def __getitem__(self, i: int) -> tuple[Any, int]:
            sample = super().__getitem__(i)
            return self.decode(sample["image"]), sample["label"]

    def open_(decode: Decode, collate: Collate, n: int) -> Iterator[Any]:
        dataset = Decoding(local=path, shuffle=True, batch_size=images.batch, epoch_size=n * images.batch)
        dataset.decode = decode
        return iter(DataLoader(dataset, images.batch, collate_fn=collate))

    return open_, {"Pillow": functools.partial(open_, planes(by_pillow), default_collate)}


def open_litdata(images: Images) -> tuple[Open, Usual]:
    """litdata: optimized chunks of bytes and labels, and of its own type of images, which it decodes by torchvision.

    An epoch cannot be longer than a set, so the images are in it several times.
    """
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(images.work / "litdata-cache")
    library: Any = importlib.import_module("litdata")
    copies = images.passes + math.ceil(2 * images.batch / len(images.rows))
    paths = {}
    for typed in (False, True):
        paths[typed] = str(images.work / f"litdata-{typed}")
        library.optimize(
            fn=functools.partial(litdata_sample, images.rows, typed), inputs=list(range(copies * len(images.rows))),
            output_dir=paths[typed], chunk_bytes="64MB", num_workers=1, verbose=False,
        )  # fmt: skip

    def open_(decode: Decode, collate: Collate, n: int) -> Iterator[Any]:
        dataset = library.StreamingDataset(
            paths[False], shuffle=True, transform=lambda sample: (decode(sample["image"]), sample["label"])
        )
        return iter(library.StreamingDataLoader(dataset, batch_size=images.batch, collate_fn=collate))

    def usual(n: int) -> Iterator[Any]:
        dataset = library.StreamingDataset(paths[True], shuffle=True)
        for found in library.StreamingDataLoader(dataset, batch_size=images.batch):
            yield found["image"], found["label"]

    return open_, {"torchvision": usual}


def litdata_sample(rows: Sequence[tuple[str, int, int, int]], typed: bool, i: int) -> dict[str, Any]:
    """What litdata's own process writes."""
    path, offset, length, label = rows[i % len(rows)]
    data = read(path, offset, length)
    return {"image": importlib.import_module("litdata").Image(bytes=data) if typed else data, "label": label}


PEERS: dict[str, Callable[[Images], tuple[Open, Usual]]] = {
    "webdataset": open_webdataset,
    ZIP: open_zip,
    "mosaicml-streaming": open_mosaic,
    "litdata": open_litdata,
}
