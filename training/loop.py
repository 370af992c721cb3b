"""train(run, team): sets up, then loops until the run has seen its images or is told to stop."""

import contextlib
import gc
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

from torch import Tensor
from tqdm import tqdm

from ..datasets.manifest import locked
from ..ops.memory import peak_memory
from . import checkpoint, health, report, schedule
from .config import Run, write_run
from .distributed import Team
from .health import Diversity, Finding, Monitor, Trouble
from .saver import Saver
from .snapshots import Snapshots, fakes, real_grid, reals, sample_grid
from .trainer import Training
from .watchdog import Grace, Watchdog

SHOWN = ("augment/", "fid-", "kid-")  # statistics in the progress line, beside the losses


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
        ValueError: the run, its data set or its folder is not fit to train with, or training is in trouble.
        OSError: writing failed. The last checkpoint stays.
    """
    if not run.out:
        raise ValueError("no folder given for the run: --out DIR")
    out, total = Path(run.out), round(run.total_kimg * 1000)
    training = begun(run, team)
    if training.nimg >= total:
        say(team, f"{out} is complete at {training.nimg / 1000:g} kimg; a larger --total-kimg goes on with it.")
        return 0
    with contextlib.ExitStack() as stack:
        training.agree(lambda: stack.enter_context(own_folder(out)) if team.main else None)
        stop = stack.enter_context(Stop(stack.enter_context(Grace(run.parallel.grace_s, lambda: too_late(run)))))
        while True:
            try:
                return loop(training, total, stop)
            except Trouble as trouble:
                heed(training, trouble)
            del training
            gc.collect()  # its parts refer to one another, and the next one needs the memory
            training = begun(run, team)


def begun(run: Run, team: Team) -> Training:
    """A run's training, where it goes on from."""
    training = Training(run, team)
    training.begin()
    return training


def loop(training: Training, total: int, stop: Stop) -> int:
    """Trains until `total` images are shown; the exit status as in `train`. Raises Trouble where the run's health calls
    for more than a warning."""
    run, team = training.run, training.team
    # Before anything is written, as what it measures by may not be there.
    snapshots = training.agree(lambda: Snapshots(training, stop.take, lambda: bool(stop.signal)))
    writer = training.agree(lambda: start_writing(training, Path(run.out)) if team.main else None)
    training.bad_log = Path(run.out) / f"bad_samples{f'-{team.rank}' if team.rank else ''}.jsonl"
    shown = team.main and sys.stderr.isatty()
    bar = tqdm(total=total, initial=training.nimg, unit="img", disable=not shown, leave=False)
    with (
        contextlib.closing(writer) if writer else contextlib.nullcontext(),
        Watchdog(team.place, team.rank, team.world, team.gather, run.parallel.watchdog_s),
        Saver() as saver,
        contextlib.closing(training.stream()) as stream,
        bar,
    ):
        tick = Tick(training)
        monitor = monitor_of(training, health.read_lines(writer.stats) if writer else [])
        training.well, diversity = monitor.well, diversity_of(training, stop)
        while training.nimg < total:
            before = training.nimg
            team.place.at("waiting for data")
            with tick.adding_to("waited"):
                batch = stop.take(stream)
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
                snapshots.estimate(tick.start, nimg)
                means = report.collect(team.sum_named) | diversity.measure(training.stage.level)
                found: list[Finding] = []
                if writer:
                    timing, skipped = tick.timing(), max(training.skipped.values(), default=0)
                    line = {"nimg": nimg, **timing, **means, **({"skipped": skipped} if skipped else {})}
                    found = monitor.see(line)
                    writer.line(line | ({"health": [each.rule for each in found]} if found else {}))
                    bar.write(tick_text(nimg, total, tick.left(total), timing, means), file=sys.stdout)
                    sys.stdout.flush()
                    training.well = monitor.well
                tick = Tick(training)
                judge(team, found, bar)
            if last or schedule.crossed(before, nimg, round(run.checkpoint_kimg * 1000)):
                training.save(saver)
        return finish(training, total, stop.signal, writer, saver, snapshots)


def too_late(run: Run) -> str:
    """What to say where the grace has passed."""
    whole = checkpoint.complete(Path(run.out) / "checkpoints")
    newest = f"the newest checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
    return f"styleloom train: not done within {run.parallel.grace_s:g} s after SIGTERM (parallel.grace_s); {newest}."


@contextlib.contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Keeps a second training out of the run's folder while this one goes on. For the main process."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"another styleloom train is running in {out}: let it end first, or give another --out"):
        yield


def start_writing(training: Training, out: Path) -> report.Writer:
    """The run's folder, with `run.json` and, at the very start, the pictures to compare with; without checkpoints that
    the training did not begin with because they are damaged."""
    checkpoint.set_aside(out / "checkpoints", training.resumed_from)
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


# The run's health


def monitor_of(training: Training, lines: Iterable[health.Line]) -> Monitor:
    """The rules that have a meaning for the run, as far as the lines of its ticks have brought them."""
    h, gentler, scores = training.run.health, training.gentler, training.recipe.scores
    rules: list[health.Rule] = [
        health.Explosion(h.explosion, h.explosion_factor, gentler),
        health.Collapse(h.collapse, h.collapse_limit, gentler),
    ]
    if scores != "distances":
        rules.append(health.Gap(h.gap, h.gap_limit, gentler))
    if scores == "logits":
        rules.append(health.Memorised(h.memorised, h.memorised_limit, gentler))
    if training.run.augment.kind == "ada":
        rules.append(health.Saturation(h.saturation, 1.0, gentler))
    return Monitor(rules, h.ticks, h.nonfinite, lines)


def diversity_of(training: Training, stop: Stop) -> Diversity:
    """Of the averaged generator's images, from latents that stay the same. Reals may take minutes to come, so a signal
    ends the waiting for them; fakes take less than an iteration."""

    def its_reals(positions: range) -> Tensor | None:
        return stop.take(reals(training, training.stage.level, each, prefetch=True) for each in [positions])

    def its_fakes(positions: range) -> Tensor:
        return fakes(training, "diversity", positions)

    return Diversity(training.run.health.images, training.team, its_fakes, its_reals)


def judge(team: Team, found: list[Finding], bar: "tqdm[Any]") -> None:
    """Tells people of what is found for the first time. Raises Trouble, on all processes, where the main one has found
    something that interrupts the run."""
    for each in found:
        if each.new and each.action == "warn":
            bar.write(f"styleloom train: {each.message}", file=sys.stderr)
    its = team.gather([health.interrupting(found)])[0]
    if its:
        raise Trouble(its)


def heed(training: Training, trouble: Trouble) -> None:
    """Takes the run's folder back to before the trouble, and lets go of the training.

    Raises ValueError where the run is to stop instead; SystemExit on all but the main process.
    """
    run, team, its = training.run, training.team, trouble.finding
    limit, out = run.health.rollbacks, Path(run.out)
    team.place.at("going back")
    if its.action == "stop" or training.rollbacks >= limit:
        raise (ValueError(f"{its.message}\n{what_is_left(training, its)}") if team.main else SystemExit(1)) from None
    to, number = training.agree(lambda: health.go_back(out, training.well, training.nimg, its) if team.main else (0, 0))
    if team.main:
        notes = "".join(f" {note}." for note in getattr(trouble, "__notes__", []))
        print(
            f"styleloom train: {its.message}{notes}\nstyleloom train: going back to {to / 1000:g} kimg, and on with "
            f"other latents (roll-back {number} of {limit}). What came after is kept as NAME.diverged-{number}.",
            file=sys.stderr,
            flush=True,
        )
    seen_by_all(team, out)
    for updater in training.updaters.values():
        updater.close()
    report.Report.load_state_dict({})


def what_is_left(training: Training, its: Finding) -> str:
    """What is left where a run is not to go on."""
    whole = checkpoint.complete(Path(training.run.out) / "checkpoints")
    good = [path for path in whole if health.nimg_of(path) <= training.well]
    left = f"The last checkpoint before it is {good[-1]}" if good else "There is no checkpoint before it"
    if its.action == "roll-back":
        return f"{left}. The run has gone back {training.rollbacks} times already (health.rollbacks)."
    more = f"; --health.{its.rule} roll-back goes back there, and on with other latents" if good else ""
    return f"{left}{more}."


def seen_by_all(team: Team, out: Path) -> None:
    """Waits until all processes see the same in the run's folder: a disk that nodes share may take a minute to show."""
    for _ in range(90):
        mine = [*map(str, checkpoint.complete(out / "checkpoints")), len(health.read_rollbacks(out))]
        if len(set(map(repr, team.gather([mine])))) == 1:
            return
        time.sleep(1)


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
            "lr": self.training.recipe.lr,
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
        + "".join(f"  {name} {value:.4g}" for name, value in means.items() if name.startswith(SHOWN))
        + (f"  {bad:.3g} NON-FINITE GRADIENT ELEMENTS A STEP" if bad else "")
        + (f"  {replaced:.2%} OF THE SAMPLES REPLACED" if replaced else "")
    )


def say(team: Team, text: str) -> None:
    """Prints once for all processes."""
    if team.main:
        print(text, flush=True)
