"""Files by name, wherever they lie: folders, http(s), object stores, commands. And whole, or not at all.

A place is a folder's path, a URL (`https://host/set`, `s3://bucket/set`, `gs://`, `hf://datasets/user/repo`, whatever
else fsspec or webdataset open), or `pipe:COMMAND` with `{}` where the file's name belongs, such as
`pipe:ssh host cat /data/set/{}`. Remote files are opened through webdataset's table of openers, `gopen_schemes`, to
which this module adds http(s) by requests and object stores by fsspec.
"""

import hashlib
import io
import os
import random
import re
import shlex
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import requests
import urllib3
from webdataset.gopen import gopen, gopen_schemes

TRIES = 10  # in a row without a byte of progress
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds from one try to the next: doubled each time
TIMEOUT = (10, 60)  # seconds to connect, and from one byte to the next
CHUNK = 1 << 20  # bytes

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://|(pipe):", re.IGNORECASE)
PASSIVE = ("https://", "http://", "s3://", "s3a://", "gs://", "gcs://", "hf://")
"""How places begin that are only read, whatever follows."""
MOST_READ = 4 << 30  # bytes of a file that is read into memory
_SHELL = re.compile(r"[^\w./:@%+=,~-]")
_PASSING = (408, 425, 429)  # HTTP's errors of the 400s that a later try may not meet
_EXTRAS = {"s3": "styleloom[s3]", "s3a": "styleloom[s3]", "gs": "styleloom[gs]", "gcs": "styleloom[gs]"}

Result = TypeVar("Result")


def always() -> bool:
    """What `wanted` is by default: a file is wanted until it is there."""
    return True


class UnavailableError(OSError):
    """A remote file that could not be had, after all tries."""


class _RefusedError(Exception):
    """The other side said no: another try would not help."""


class _BrokenError(Exception):
    """What came is not what was promised."""


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL or a command, and not a path here. `file://` is a path."""
    match = _SCHEME.match(os.fspath(place))
    return bool(match) and (match[1] or "").lower() != "file"


def local_path(place: str | os.PathLike[str]) -> Path:
    """The path of a place that is not remote."""
    text = os.fspath(place)
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(text).path) if text.lower().startswith("file://") else text)


def join(place: str | os.PathLike[str], name: str) -> str:
    """The file `name` (with forward slashes) at a place. A query of an http(s) place (a signature) stays at the end.

    Raises ValueError for a command without `{}`.
    """
    text = os.fspath(place)
    if not is_remote(text):
        return os.path.join(local_path(text), name)
    if text.lower().startswith("pipe:"):
        if "{}" not in text:
            raise ValueError(
                f"{text} has no {{}}, where the name of the file belongs: pipe:ssh host cat /data/set/{{}}"
            )
        return text.replace("{}", shlex.quote(name))
    if not text.lower().startswith(("http:", "https:")):
        return f"{text.rstrip('/')}/{name}"
    base, question, query = text.partition("?")
    return f"{base.rstrip('/')}/{urllib.parse.quote(name)}{question}{query}"


def subfolder(place: str | os.PathLike[str], name: str) -> str:
    """The place of a folder within a place."""
    text = os.fspath(place)
    return text.replace("{}", f"{name}/{{}}") if text.lower().startswith("pipe:") else join(text, name)


def open_url(url: str, start: int = 0) -> BinaryIO:
    """A remote file as a stream to read and close, from byte `start` on.

    Raises errors of many kinds, when opened and when read; `fetch` and `read` know what to make of them.
    """
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    if scheme in _OURS:
        return cast(BinaryIO, gopen(url, "rb", start=start))
    if scheme not in gopen_schemes:
        return _open_fsspec(url, start=start)
    # The others are programs that webdataset starts. What the user wrote is a command or a place; what a data set calls
    # its files must not become one.
    if scheme != "pipe" and _SHELL.search(url):
        raise _RefusedError("its name could be taken for a command")
    return cast(BinaryIO, _skipped(gopen(url, "rb"), start))


def read(url: str) -> bytes:
    """A whole remote file (a small one), with retries. Raises UnavailableError, FileNotFoundError if there is none."""

    def attempt() -> bytes:
        with closing(open_url(url)) as stream:
            blocks, size = [], 0
            while block := stream.read(CHUNK):
                blocks.append(block)
                size += len(block)
                if size > MOST_READ:
                    raise _RefusedError(f"it has more than {MOST_READ >> 30} GiB")
            return b"".join(blocks)

    return _persist(url, attempt)


def fetch(
    url: str,
    path: Path,
    size: int | None = None,
    sha256: str | None = None,
    wanted: Callable[[], bool] = always,
) -> None:
    """Copies a whole remote file to `path`, with retries; a connection that broke is taken up where it broke.

    size: in bytes; sha256: in hex; what does not agree is fetched anew. `path` appears only once it is complete.
    wanted: asked before another try.
    Raises UnavailableError, FileNotFoundError if there is none, and OSError where `path` cannot be written.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(temporary, "w+b") as file:
            copy = _Copy(url, file, size, sha256)
            _persist(url, copy.attempt, lambda: copy.most, wanted)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Copy:
    """A file in the course of being fetched."""

    def __init__(self, url: str, file: BinaryIO, size: int | None, sha256: str | None) -> None:
        self.url, self.file, self.size, self.sha256 = url, file, size, sha256
        self.most = 0  # bytes: as far as it ever came
        self._begin()

    def _begin(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.digest = hashlib.sha256()

    def attempt(self) -> None:
        try:
            stream = open_url(self.url, self.file.tell())
        except _PastEndError:
            came = self.file.tell()
            self._begin()
            raise _BrokenError(f"the file there has no more than the {came} bytes that came") from None
        with closing(stream):
            while block := stream.read(CHUNK):
                self.digest.update(block)
                _write(self.file, block)
                self.most = max(self.most, self.file.tell())
                if self.size is not None and self.file.tell() > self.size:
                    break
        got = self.file.tell()
        if self.size is not None and got < self.size:
            raise _BrokenError(f"the connection ended after {got} of {self.size} bytes")
        if self.size not in (None, got) or self.sha256 not in (None, self.digest.hexdigest()):
            self._begin()
            raise _BrokenError(f"other bytes came than the manifest promises ({got} bytes)")
        _write(self.file, b"")


class _PastEndError(Exception):
    """There is nothing from the byte on that was asked for."""


class _FullError(Exception):
    """Wraps an error of this machine's disk, which is not the connection's."""


def _write(file: BinaryIO, block: bytes) -> None:
    """Writes a block; an empty one writes what is buffered yet."""
    try:
        file.write(block)
        if not block:
            file.flush()
    except OSError as error:
        raise _FullError(error) from None


def _persist(
    url: str,
    attempt: Callable[[], Result],
    progress: Callable[[], int] = lambda: 0,
    wanted: Callable[[], bool] = always,
) -> Result:
    """`attempt()` until it succeeds, or fails TRIES times without `progress` (bytes), or for good."""
    failures, came = 0, 0
    while True:
        try:
            return attempt()
        except _FullError as error:
            raise error.args[0] from None
        except (_RefusedError, FileNotFoundError, PermissionError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else UnavailableError
            raise kind(f"cannot read {shown(url)}: {_reason(error, url)}") from None
        except ImportError:
            scheme = urllib.parse.urlsplit(url).scheme
            package = _EXTRAS.get(scheme, f"the fsspec package for {scheme}://")
            raise UnavailableError(f"cannot read {shown(url)}: install {package} first") from None
        except Exception as error:  # libraries of every kind have errors of every kind
            if progress() > came:
                failures, came = 0, progress()
            failures += 1
            if failures >= TRIES or not wanted():
                raise UnavailableError(f"cannot read {shown(url)} ({failures} tries): {_reason(error, url)}") from None
            delay = min(FIRST_DELAY * 2 ** (failures - 1), LONGEST_DELAY) * random.uniform(0.75, 1.25)
            again = f"trying again in {delay:.1f} s ({failures} of {TRIES})"
            print(f"styleloom: {shown(url)}: {_reason(error, url)}; {again}", file=sys.stderr, flush=True)
            time.sleep(delay)


def shown(url: str) -> str:
    """The URL as it may be shown: without a query (signatures) or a password."""
    if url.startswith("pipe:"):
        return url
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _reason(error: BaseException, url: str = "") -> str:
    """What went wrong, in a line, without what `shown` leaves out of the URL."""
    first = error.args[0] if isinstance(error, urllib3.exceptions.HTTPError) and error.args else error
    text = " ".join(str(first).split()) or type(error).__name__
    parts = urllib.parse.urlsplit(url)
    for secret in (parts.query, parts.password):
        if secret and not url.startswith("pipe:"):
            text = text.replace(secret, "***")
    return text if len(text) <= 160 else f"{text[:157]}..."


def _skipped(stream: Any, start: int) -> Any:
    """The stream without its first `start` bytes, of which it cannot be asked."""
    while start > 0:
        block = stream.read(min(start, CHUNK))
        if not block:
            break
        start -= len(block)
    return stream


class _Body(io.RawIOBase):
    """The body of an HTTP response. Its end is an error if it comes before the announced length."""

    def __init__(self, session: requests.Session, response: requests.Response) -> None:
        self.session, self.response = session, response

    def read(self, size: int = -1) -> bytes:
        return self.response.raw.read(None if size < 0 else size) or b""

    def close(self) -> None:
        self.response.close()
        self.session.close()
        super().close()


def _open_http(url: str, mode: str = "rb", bufsize: int = 8192, start: int = 0) -> BinaryIO:
    # Not compressed on the way: what is hashed is the file.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    session = requests.Session()
    body = _Body(session, session.get(url, stream=True, timeout=TIMEOUT, headers=headers))
    try:
        return cast(BinaryIO, _checked(body, start))
    except BaseException:
        body.close()
        raise


def _checked(body: _Body, start: int) -> io.RawIOBase:
    """The body, which begins at byte `start`, if the answer was what was asked for."""
    status, reason = body.response.status_code, body.response.reason
    if status in (404, 410):
        raise FileNotFoundError(f"HTTP {status} {reason}")
    if status == 416:
        raise _PastEndError(f"HTTP {status} {reason}")
    if 400 <= status < 500 and status not in _PASSING:
        raise _RefusedError(f"HTTP {status} {reason}")
    if status not in (200, 206):
        raise _BrokenError(f"HTTP {status} {reason}")
    if status == 200:
        return _skipped(body, start)
    served = body.response.headers.get("Content-Range", "")
    if not served.startswith(f"bytes {start}-"):
        raise _BrokenError(f"asked from byte {start}, it sent {served or 'something else'}")
    return body


def _open_fsspec(url: str, mode: str = "rb", bufsize: int = 8192, start: int = 0) -> BinaryIO:
    try:
        system, path = fsspec.url_to_fs(url)
    except ValueError as error:  # no such protocol
        raise _RefusedError(_reason(error)) from None
    # Read from front to back, so nothing is gained by keeping blocks; each is asked for once.
    file = system.open(path, "rb", block_size=8 * CHUNK, cache_type="readahead")
    file.seek(start)
    return cast(BinaryIO, file)


_OURS: dict[str, Callable[..., BinaryIO]] = {
    "http": _open_http,
    "https": _open_http,
    "s3": _open_fsspec,
    "gs": _open_fsspec,
    "hf": _open_fsspec,
}
gopen_schemes.update(_OURS)


def listing(place: str, suffix: str) -> Iterator[str]:
    """Names of the remote files below a place that end with `suffix`, sorted, with forward slashes.

    Raises UnavailableError, and ValueError for places that cannot be listed (http(s), commands).
    """
    scheme = urllib.parse.urlsplit(place).scheme.lower()
    if scheme in ("http", "https") or place.startswith("pipe:"):
        raise ValueError(f"{shown(place)} cannot be listed: name the tars, as in https://host/set/{{00000..00099}}.tar")

    def attempt() -> list[str]:
        system, path = fsspec.url_to_fs(place)
        system.invalidate_cache()
        root = path.rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in system.find(path) if name.lower().endswith(suffix))

    yield from _persist(place, attempt)
