"""Labels as people write them -> class numbers 0, 1, 2, ...

Files of labels are stylegan2-ada's `dataset.json` or a CSV of name,label. Where classes are named in words, the sorted
words are numbered.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_MOST_CLASSES = 1_000_000
_WHOLE = re.compile(r"-?[0-9]{1,18}$")
_FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]+(e[+-]?[0-9]+)?$", re.IGNORECASE)


def read_labels(path: Path) -> Mapping[str, object]:
    """Labels by name, from a file. Raises ValueError if it is not of a known form, OSError if it cannot be read."""
    if path.suffix.lower() not in (".json", ".csv"):
        raise ValueError(f"--labels takes auto, none, folders, a .json or a .csv, not {path}")
    data = path.read_bytes()
    if path.suffix.lower() == ".csv":
        return _parse_csv(data, path)
    labels = parse_labels(data, path)
    if labels is None:
        raise ValueError(f'{path} holds no labels ("labels" is null); use --labels none')
    return labels


def parse_labels(data: bytes, origin: Path) -> dict[str, object] | None:
    """Labels of the form {"labels": [[name, class], ...]}; None for {"labels": null}."""
    form = f'{origin} is not of the form {{"labels": [["NAME", CLASS], ...]}}'
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{form}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(form)
    pairs = content.get("labels")
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(
        isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise ValueError(form)
    return _collect(pairs, origin)


def _parse_csv(data: bytes, origin: Path) -> dict[str, object]:
    """Rows of name,label, with or without a heading."""
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{origin} is not a CSV file in UTF-8: {error}") from None
    if rows and rows[0][0].strip().lower() in ("name", "file", "filename", "file_name", "image", "path", "key"):
        rows = rows[1:]
    elif len(rows) > 1 and not _is_whole(rows[0]) and all(map(_is_whole, rows[1:])):
        rows = rows[1:]  # a heading of other words
    bad = next((row for row in rows if len(row) != 2), None)
    if bad is not None or not rows:
        raise ValueError(f"{origin} must have rows of name,label" + (f", not {','.join(bad)!r:.80}" if bad else ""))
    return _collect([(name.strip(), label.strip()) for name, label in rows], origin)


def _is_whole(row: Sequence[str]) -> bool:
    return len(row) == 2 and bool(_WHOLE.match(row[1].strip()))


def _collect(pairs: Sequence[Sequence], origin: Path) -> dict[str, object]:
    labels: dict[str, object] = {}
    for raw, label in pairs:
        name = raw.replace("\\", "/").removeprefix("./")
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{origin} gives {name} two labels: {labels[name]!r} and {label!r}")
    return labels


def class_text(name: str, label: object, origin: str, named: bool = False) -> str:
    """A label as text; `named`: it is a name even where it looks like a number.

    Raises ValueError, naming the picture and where its label comes from, if the label is no class.
    """
    if not isinstance(label, int | str) or isinstance(label, bool) or (not named and _FRACTION.match(str(label))):
        raise ValueError(
            f"the label of {name} in {origin} is {str(label)[:60]}: only classes are supported "
            "(0, 1, 2, ... or names), no vectors and no fractions"
        )
    return str(label)


def number_classes(texts: Iterable[str], origin: str, named: bool = False) -> tuple[dict[str, int], tuple[str, ...]]:
    """The number of each label, by its text, and the name of each class, by its number. `named`: as in `class_text`.

    Raises ValueError if a label is a number, but not that of a class.
    """
    texts = set(texts)
    if not texts:
        return {}, ()
    if named or not all(map(_WHOLE.match, texts)):
        names = tuple(sorted(texts))
        return {text: number for number, text in enumerate(names)}, names
    number = {text: int(text) for text in texts}
    for worst in (min(number.values()), max(number.values())):
        if not 0 <= worst < _MOST_CLASSES:
            raise ValueError(f"label {worst} in {origin} is no class number: classes are numbered 0, 1, 2, ...")
    return number, tuple(str(k) for k in range(max(number.values()) + 1))
