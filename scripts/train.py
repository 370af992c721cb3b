"""`styleloom train PRESET --data.path DATASET --out DIR [--section.field VALUE ...] [--dry-run]`"""

from collections.abc import Sequence

import tyro

from styleloom.scripts.cli import parse, run
from styleloom.training.config import PRESETS, Run


def main(args: Sequence[str]) -> int | None:
    """Trains from a preset, or goes on with the run in --out."""
    args = list(args)
    dry = "--dry-run" in args
    args = [a for a in args if a != "--dry-run"]
    if not args or args[0] in ("-h", "--help"):
        print("usage: styleloom train PRESET --data.path DATASET --out DIR [--section.field VALUE ...] [--dry-run]\n")
        print(f"presets: {', '.join(PRESETS)}     (styleloom train PRESET --help lists the fields)")
        return 0 if args else 2
    settings = read_settings(args[0], args[1:])
    from styleloom.training.distributed import Team  # after the arguments: a typo should not cost the imports

    team = Team()
    if dry:
        from styleloom.training.dryrun import dry_run as act
    else:
        from styleloom.training.loop import train as act
    status = act(settings, team)
    team.close()  # not where something was raised: it may wait for the others, who wait for this process
    return status


def read_settings(preset: str, args: Sequence[str], prog: str = "train") -> Run:
    """The preset with the fields that the arguments change. Raises ValueError for a preset that does not exist."""
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}. There are: {', '.join(PRESETS)}.")
    return parse(Run, args, f"{prog} {preset}", default=PRESETS[preset], config=(tyro.conf.AvoidSubcommands,))


if __name__ == "__main__":
    run(main, "train")
