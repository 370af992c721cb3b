"""train(run, team): sets up, then loops until the run has seen its images or is told to stop."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

from tqdm import tqdm

from ..datasets.manifest import locked
from ..ops.memory import peak_memory
from . import checkpoint, report, schedule
from .config import Run, write_run
from .distributed import Team
from .saver import Saver
from .snapshots import Snapshots, real_grid, sample_grid
from .trainer import Training
from .watchdog import Grace, Watchdog


class _Woken(BaseException):
    """A signal, while waiting."""


class Stop:
    """Whether SIGTERM or Ctrl-C has come. The first ends training in good order; a second Ctrl-C ends it at once, but
    for a save that is being written.

    Args:
        grace: begins with SIGTERM.
    """

    def __init__(self, grace: Grace) -> None:
        self.grace = grace

    def __enter__(self) -> Self:
        self.signal, self.waiting = 0, False
        self.before = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _take(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGTERM:
            self.grace.start()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.waiting:
            self.waiting = False  # a second signal may come while the first is being heeded
            raise _Woken

    def take(self, items: Iterator[Any]) -> Any | None:
        """The next item; None if a signal has come, also while it was waited for (shards may take minutes to come)."""
        self.waiting = True
        try:
            return None if self.signal else next(items)
        except _Woken:
            return None
        finally:
            self.waiting = False

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(run: Run, team: Team) -> int:
    """Trains (or goes on with) a run in `run.out` until it has shown `run.total_kimg`.

    Returns:
        0, or 128 + the number of the signal that stopped it, after saving.

    Raises:
        ValueError: the run, its data set or its folder is not fit to train with, or training diverged.
        OSError: writing failed. The last checkpoint stays.
    """
    if not run.out:
        raise ValueError("no folder given for the run: --out DIR")
    training = Training(run, team)
    out, total = Path(run.out), round(run.total_kimg * 1000)
    training.begin()
    if training.nimg >= total:
        say(team, f"{out} is complete at {training.nimg / 1000:g} kimg; a larger --total-kimg goes on with it.")
        return 0
    with contextlib.ExitStack() as stack:
        training.agree(lambda: stack.enter_context(own_folder(training, out)) if team.main else None)
        return loop(training, total)


def loop(training: Training, total: int) -> int:
    """Trains until `total` images are shown; the exit status as in `train`."""
    run, team = training.run, training.team
    writer = training.agree(lambda: start_writing(training, Path(run.out)) if team.main else None)
    training.bad_log = Path(run.out) / f"bad_samples{f'-{team.rank}' if team.rank else ''}.jsonl"
    shown = team.main and sys.stderr.isatty()
    bar = tqdm(total=total, initial=training.nimg, unit="img", disable=not shown, leave=False)
    with (
        Grace(run.parallel.grace_s, lambda: too_late(run)) as grace,
        Stop(grace) as stop,
        Watchdog(team.place, team.rank, team.world, team.gather, run.parallel.watchdog_s),
        Saver() as saver,
        contextlib.closing(training.stream()) as reals,
        bar,
    ):
        tick, snapshots = Tick(training), Snapshots(training, stop.take)
        while training.nimg < total:
            before = training.nimg
            team.place.at("waiting for data")
            with tick.adding_to("waited"):
                batch = stop.take(reals)
            # Only now, when all have their batches, or a signal instead: nobody has to wait for a batch to stop.
            if training.stopping(stop.signal, saver):
                break
            assert batch is not None
            with tick.adding_to("worked"):
                training.step(*batch)
            bar.update(training.nimg - before)

            nimg, last = training.nimg, training.nimg >= total
            ended = last or training.stage_ends()
            if ended:
                snapshots.add_level(writer, last)
            if last or schedule.crossed(before, nimg, round(run.snapshot_kimg * 1000)):
                snapshots.write(writer)
            if ended or schedule.crossed(before, nimg, round(run.tick_kimg * 1000)):
                training.check_replicas()
                means = report.collect(team.sum_named)
                if writer:
                    timing = tick.timing()
                    writer.line({"nimg": nimg, **timing, **means})
                    bar.write(tick_text(nimg, total, tick.left(total), timing, means), file=sys.stdout)
                    sys.stdout.flush()
                tick = Tick(training)
            if last or schedule.crossed(before, nimg, round(run.checkpoint_kimg * 1000)):
                training.save(saver)
        return finish(training, total, stop.signal, writer, saver, snapshots)


def too_late(run: Run) -> str:
    """What to say where the grace has passed."""
    whole = checkpoint.complete(Path(run.out) / "checkpoints")
    newest = f"the newest checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
    return f"styleloom train: not done within {run.parallel.grace_s:g} s after SIGTERM (parallel.grace_s); {newest}."


@contextlib.contextmanager
def own_folder(training: Training, out: Path) -> Iterator[None]:
    """Keeps a second training out of the run's folder while this one goes on. For the main process."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"another styleloom train is running in {out}: let it end first, or give another --out"):
        checkpoint.set_aside(out / "checkpoints", training.resumed_from)
        yield


def start_writing(training: Training, out: Path) -> report.Writer:
    """The run's folder, with `run.json` and, at the very start, the pictures to compare with."""
    write_run(training.run, out / "run.json")
    writer = report.Writer(out, training.nimg)
    if training.nimg == 0:
        writer.picture("reals", real_grid(training), 0)
        writer.picture(f"fakes-{0:09d}", sample_grid(training), 0)
    return writer


def finish(
    training: Training, total: int, number: int, writer: report.Writer | None, saver: Saver, snapshots: Snapshots
) -> int:
    """Saves what a signal interrupted, says how it ended, and gives the exit status."""
    team, out = training.team, training.run.out
    stopped = training.nimg < total
    if stopped:
        training.save(saver)
    training.saved(saver)
    if stopped:
        snapshots.write(writer, at_stop=True)
    if writer:
        writer.close()
    if stopped:
        say(team, f"Stopped at {training.nimg / 1000:g} kimg and saved. The same command goes on from there.")
        return 128 + (number or signal.SIGTERM)
    say(
        team,
        f"Done: {training.nimg / 1000:g} kimg in {report.duration(training.seconds)}. {out}/samples has the pictures.",
    )
    return 0


class Tick:
    """The clock of one tick, which lies within a stage: what the machine did, apart from what was learned."""

    def __init__(self, training: Training) -> None:
        self.training, self.start = training, training.nimg
        peak_memory(training.team.device)  # what was before does not count
        self.waited = self.worked = 0.0

    @contextlib.contextmanager
    def adding_to(self, share: str) -> Iterator[None]:
        """Adds the time that the block takes to "waited" (for data) or "worked", and to the training's."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        setattr(self, share, getattr(self, share) + seconds)
        self.training.seconds += seconds

    def timing(self) -> dict[str, Any]:
        """The tick's figures for `stats.jsonl`."""
        images, seconds = self.training.nimg - self.start, self.waited + self.worked
        stage = self.training.stage
        return {
            "px": self.training.px(stage.level),
            "batch": stage.batch,
            "lr": stage.lr,
            "sec_per_kimg": seconds / images * 1000,
            "images_per_s": images / seconds,
            "data_wait": self.waited / seconds,
            "peak_memory_gb": peak_memory(self.training.team.device) / 2**30,
            "seconds": self.training.seconds,
        }

    def left(self, total: int) -> str:
        """Time to the end if images take as long as in this tick; where they grow before, to the next size."""
        done = self.training.nimg
        stages = self.training.stages(done)
        ahead = [(nimg, stage) for nimg, stage in stages[1:] if stage.level > stages[0][1].level]
        end, to = total, ""
        if ahead and ahead[0][0] < total:
            end, to = ahead[0][0], f" to {self.training.px(ahead[0][1].level)} px"
        return report.duration((end - done) * (self.waited + self.worked) / (done - self.start)) + to


def tick_text(nimg: int, total: int, left: str, timing: dict[str, Any], means: dict[str, float]) -> str:
    """The progress line, with every statistic that is called loss/NAME."""
    faded = f" {means['alpha']:.0%} faded in" if means.get("alpha", 1.0) < 1 else ""
    losses = "  ".join(f"{name[5:]} {value:.3g}" for name, value in means.items() if name.startswith("loss/"))
    bad = sum(value for name, value in means.items() if name.startswith("nonfinite/"))
    replaced = means.get("data/replaced", 0.0)
    return (
        f"kimg {nimg / 1000:8.1f} / {total / 1000:g}  {timing['px']} px{faded}  {timing['sec_per_kimg']:.2f} sec/kimg  "
        f"{timing['images_per_s']:.1f} img/s  data wait {timing['data_wait']:.1%}  {losses}  "
        f"mem {timing['peak_memory_gb']:.1f} GB  ETA {left}"
        + (f"  {bad:.3g} NON-FINITE GRADIENT ELEMENTS A STEP" if bad else "")
        + (f"  {replaced:.2%} OF THE SAMPLES REPLACED" if replaced else "")
    )


def say(team: Team, text: str) -> None:
    """Prints once for all processes."""
    if team.main:
        print(text, flush=True)
