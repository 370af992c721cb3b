"""The `styleloom` command: finds the sub-command, reads its arguments, turns users' errors into a line or two."""

import contextlib
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from pydantic import ValidationError

COMMANDS = {
    "demo": "prepare the embedded pictures, train a small StyleGAN2, show what it draws",
    "prepare": "turn pictures into tar shards and a manifest",
    "inspect": "show, verify or draw a prepared data set",
    "train": "train from a preset, or continue a run",
    "generate": "draw images from a snapshot",
    "mix": "draw a style-mixing table: images with the styles of others in some layers",
    "interpolate": "film the way from one image to the next",
    "project": "find the latents whose image is most like a picture",
    "average": "averages of other widths from those in a run's snapshots",
    "evaluate": "measure a snapshot: FID, KID, Inception Score, precision and recall, path length",
    "convert": "read official StyleGAN2 weights, or write a snapshot's generator as an ONNX model",
    "bench": "time the ops, training phases or reading data, against what this machine can do",
    "doctor": "show what this machine has, each op's path and why",
}


def main() -> None:
    """Entry point of the console script."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print("usage: styleloom COMMAND [ARGUMENTS]     (styleloom COMMAND --help tells more)\n")
        for name, what in COMMANDS.items():
            print(f"  {name:<12} {what}")
        sys.exit(0 if args else 2)
    if args[0] not in COMMANDS:
        print(f"styleloom: no command {args[0]!r}. There are: {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"styleloom.scripts.{args[0]}")
    run(module.main, args[0], args[1:])


def run(command: Callable[[Sequence[str]], int | None], name: str, args: Sequence[str] | None = None) -> None:
    """Runs `command(args)` and exits with its status.

    `ValueError` and `OSError` are what a user can mend: they end in a line or two on stderr and status 1.
    `STYLELOOM_TRACEBACK=1` shows the traceback as well. Anything else is our defect and keeps its traceback.
    """
    try:
        status = command(sys.argv[1:] if args is None else args)
    except KeyboardInterrupt:
        print(f"\nstyleloom {name}: interrupted.", file=sys.stderr)
        status = 130
    except (ValueError, OSError) as error:
        if os.environ.get("STYLELOOM_TRACEBACK"):
            traceback.print_exc()
        print(f"styleloom {name}: {explain(error)}", file=sys.stderr)
        status = 1
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # torch raises it wherever the program is when the worker dies
            print(
                f"styleloom {name}: a process that reads data was killed ({str(error).splitlines()[0]}) "
                "Where memory is short, fewer --data.workers help.",
                file=sys.stderr,
            )
            sys.exit(1)
        if "out of memory" not in str(error):
            raise
        print(
            f"styleloom {name}: out of memory ({str(error).splitlines()[0]})\n"
            "More --passes or a smaller --batch (of `train`), or a smaller --batch (of the others) need less.",
            file=sys.stderr,
        )
        status = 1
    sys.exit(status or 0)


def explain(error: Exception) -> str:
    """The error in a line or two, for a person."""
    if isinstance(error, ValidationError):
        faults = [f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {_message(e)}" for e in error.errors()]
        return "; ".join(faults)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        advice = " (free some space and run the same command again)" if error.errno == 28 else ""
        return f"{error.strerror}{where}{advice}"
    return str(error)


def _message(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    return message if fault["type"] == "value_error" else f"{message}, not {fault['input']!r}"


def parse(target: Any, args: Sequence[str], prog: str, **options: Any) -> Any:
    """`tyro.cli(target, ...)` whose complaints are one or two lines instead of a box.

    `--help` prints tyro's page and exits 0; a wrong argument exits 2.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(target, args=list(args), prog=f"styleloom {prog}", **options)
    except SystemExit as stop:
        if stop.code:
            print(f"styleloom {prog}: {_unbox(stderr.getvalue())}", file=sys.stderr)
        raise


def _unbox(text: str) -> str:
    """The message of tyro's error box (which is drawn with dashes where stdout is not UTF-8), without the box, the
    repeated help and pydantic's links."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip("│ ").strip() for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    parts = re.split(r"\s*[─-]{10,}\s*", " ".join(line for line in lines if line))
    if "╭" not in text:
        parts = parts[1:] or parts  # the box's title
    message = re.sub(r"\[type=.*?(?=$|─)", "", parts[0]).strip()
    message = re.sub(r"^Error parsing \w+: \d+ validation errors? for \w+ ", "", message)
    hint = next((p for p in parts if p.startswith("Perhaps you meant")), "")
    hint = re.search(r"--[\w.-]+", hint)
    return message.rstrip(".") + (f". Perhaps you meant {hint[0]}?" if hint else ". --help lists the options.")
