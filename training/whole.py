"""Files and folders that appear whole or not at all: written under another name beside it, then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, in an existing folder, that becomes `path` only if the block ends well.

    Raises OSError naming `path`; what was there before stays then.
    """
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _naming(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` only if the block ends well.

    Raises:
        ValueError: `path` is there already, with something in it.
        OSError: naming `path`.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already and not an empty folder: name another one")
    temporary = _beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise _naming(error, path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A hidden name, this process's own, on the same disk."""
    return path.absolute().with_name(f".{path.name}.{os.getpid()}.tmp")


def _naming(error: OSError, path: Path) -> OSError:
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))
