"""All that trains, as one object: the data set, the recipe with its networks, the average, and how far it has come."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..datasets.batch import Bad, told
from ..datasets.stream import Stretch, batches, check_share
from ..datasets.workers import default_workers
from ..ops.memory import give_back_freed_memory, keep_freed_memory
from . import checkpoint, ema, health, phema, recipes, report, schedule
from .agreement import check_agreement, check_replicas, code_version
from .config import Run, flat, protected_differences
from .data import Opened, cache_of, open_data
from .distributed import Divided, Replicated, State, Team, Updater
from .draws import Draws, sample_seed
from .initialise import from_snapshot
from .phases import Batch, Phase, own_rows, reached, run_phase
from .saver import Saver
from .schedule import Stage

TOLD = 20  # replaced samples that are told of on stderr; all are written down
T = TypeVar("T")


class Training:
    """All that trains: the data set, the recipe with its networks, the average, and how far it has come."""

    def __init__(self, run: Run, team: Team) -> None:
        self.run, self.team = run, team
        check_agreement(team.rank, team.gather, flat(run), versions())
        self.data = open_data(run, team)
        largest = self.data[0]
        self.manifest = m = largest.manifest
        self.width, self.height = m.width // largest.reduce, m.height // largest.reduce
        if team.main and self.data[-1].reduce > largest.reduce:
            print(
                f"Note: low levels decode images of {m.width}x{m.height}. A data set prepared at all sizes (styleloom "
                "prepare --resize box --resolution 1024 512 256 ... 4) spares that.",
                flush=True,
            )
        if team.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        else:
            keep_freed_memory()
            if run.precision == "fp16" and team.main:
                print("Note: fp16 on a CPU is many times slower than --precision fp32.", flush=True)
        class_counts = m.class_counts if run.data.labels else []
        self.recipe = recipes.build(run, self.width, self.height, m.channels, class_counts, team.device)
        self._check_schedule()
        self.average = ema.average_of(self.recipe.networks[self.recipe.averaged])
        # By relative width: power-function averages of the parameters.
        self.averages = {sigma_rel: ema.parameters_of(self.average) for sigma_rel in run.ema.sigma_rel}
        self.updaters: dict[str, Updater] = {}  # by network, of the stage's optimizers; from `begin` on
        self.resumed_from: Path | None = None  # a checkpoint
        self.nimg = 0
        self.rollbacks = 0  # how often the run has gone back to a checkpoint, to go on with other draws
        self.seconds = 0.0  # of training, over all tries
        self.bad_log: Path | None = None  # where replaced samples are written down
        self.bad_seen: set[tuple[str, int]] = set()
        self.bad_last: Bad | None = None
        self.replaced: Tensor | None = None  # fp64 [n]: which of the batch's samples are, 1 or 0
        self.streamed_from = 0  # nimg
        self.bad_new = self.bad_total = 0  # replaced here since the last sum, and by all processes
        self.skipped: dict[str, int] = {}  # steps left out in a row, by phase
        self.well = 0  # images at the last tick at which all was well; kept by the main process's loop

    def _check_schedule(self) -> None:
        """Raises ValueError if the batch of a stage cannot be divided, or a size is named that there is not."""
        run, world, growth = self.run, self.team.world, self.run.growth
        sizes = [4 << level for level in range(self.recipe.levels)]
        for px in (px for px, _ in (*growth.batch, *growth.lr)):
            if px not in sizes:
                raise ValueError(
                    f"growth.batch and growth.lr: there is no size {px}; sizes are {sizes[0]} to {sizes[-1]}"
                )
        ignored = run.batch != type(run)().batch or run.recipe.lr != type(run.recipe)().lr
        if growth.gpus and ignored and self.team.main:
            print(
                f"Note: growth.gpus {growth.gpus} sets batch and learning rate; --batch and --recipe.lr have no "
                "effect, but --growth.batch and --growth.lr have.",
                flush=True,
            )
        total = round(run.total_kimg * 1000)
        for batch in sorted({stage.batch for nimg, stage in self.stages(0) if nimg < total}):
            each, rest = divmod(batch, world * run.passes)
            if rest or each % run.network.mbstd_group:
                group = run.network.mbstd_group
                what = "a whole number: change batch or passes"
                if group > 1:
                    what = (
                        f"a multiple of network.mbstd_group {group}: change batch (or growth's), passes or "
                        "network.mbstd_group"
                    )
                raise ValueError(
                    f"batch {batch} over {world} processes in {run.passes} passes leaves "
                    f"{batch / world / run.passes:g} images a pass, which has to be {what}"
                )

    @property
    def stage(self) -> Stage:
        """Of the schedule: that of the last iteration, and of the next one once it `follow`s."""
        return self.recipe.stage

    def px(self, level: int) -> int:
        """Width of a level's images. (A schedule counts sizes as those of square images: 4, 8, 16, ...)"""
        return self.recipe.G.size_at(level)[1]

    def stage_ends(self) -> bool:
        """Whether the next iteration is in another stage than the last one."""
        return schedule.stage(self.run, self.recipe.levels, self.nimg) != self.stage

    @property
    def draw_seed(self) -> int:
        """Of everything that is drawn for training, other than the order of the images."""
        return sample_seed(self.run.seed, "rollback", self.rollbacks) if self.rollbacks else self.run.seed

    @property
    def data_hash(self) -> str:
        """Identifies the images that the run is trained on, at all its sizes."""
        if len(self.data) == 1:
            return self.manifest.hash
        parts = [(each.manifest.hash, each.reduce) for each in self.data]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def stages(self, nimg: int) -> list[tuple[int, Stage]]:
        """(`nimg` of its first iteration, stage) of the stage at `nimg` and of all that follow."""
        return schedule.stages(self.run, self.recipe.levels, nimg)

    def opened(self, level: int) -> Opened:
        """The data set at the size of a level."""
        return self.data[self.recipe.levels - 1 - level]

    def stream(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This process's share of the batches from `nimg` on. Tells the report, and people, of replaced samples."""
        team, bad, sets = self.team, [], self.recipe.reals
        self.streamed_from = self.nimg
        its = self.batches(
            self.stage.level,
            start=self.nimg * sets,
            batch=self.stage.batch * sets,
            then=[
                Stretch(start * sets, stage.batch * sets, *self.opened(stage.level))
                for start, stage in self.stages(self.nimg)[1:]
            ],
            rank=team.rank,
            world=team.world,
            workers=self.data_workers(),
            pin_memory=team.device.type == "cuda",
            prefetch=team.local_rank == 0,
            report_bad=bad.append,
        )
        with contextlib.closing(its):
            try:
                for images, labels in its:
                    self.replaced = (torch.arange(len(labels)) < len(bad)).double()
                    self.bad_new += len(bad)
                    self.tell_of(bad)
                    yield images, labels
            finally:
                self.tell_of(bad)

    def batches(self, level: int, **options: Any) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Batches of the run's data set as the run wants them, of the size of a level; `options` are more of
        `datasets.stream.batches`."""
        d, opened = self.run.data, self.opened(level)
        return batches(
            opened.folder,
            opened.manifest,
            seed=self.run.seed,
            mirror=d.mirror,
            labelled=d.labels,
            reduce=opened.reduce,
            device=self.team.device if d.decoder == "gpu" else None,
            window=d.window,
            cache=cache_of(self.run),
            max_bad=1.0,  # `stopping` counts over all processes
            **options,
        )

    def stopping(self, signal: int, saver: Saver) -> bool:
        """Whether a signal (0: none) came to any process. To be called by every process, before each iteration.

        Raises, on all processes:
            ValueError: more samples were replaced than `data.max_bad` allows.
            OSError: the last checkpoint could not be written; SystemExit where another process says so.
        """
        _, fault = _attempt(saver.check)
        signals, bad, faults = self.team.totals(bool(signal), self.bad_new, fault is not None)
        self._raise_together(fault, faults)
        self.bad_new, self.bad_total = 0, self.bad_total + round(bad)
        if bad:
            last = next(each for each in self.team.gather([self.bad_last]) if each is not None)
            shown = (self.nimg - self.streamed_from) * self.recipe.reals
            check_share(self.bad_total, shown, self.run.data.max_bad, last)
        return signals > 0

    def saved(self, saver: Saver) -> None:
        """Returns once the last checkpoint is written; raises OSError or SystemExit as `stopping` does, on all."""
        self.team.place.at("saving")
        self.agree(saver.finish)

    def agree(self, action: Callable[[], T]) -> T:
        """What `action` returns, if it raises on no process. To be called by all.

        Raises its ValueError or OSError where it does, and SystemExit on the others: none goes on, or ends well, alone,
        and one message is enough.
        """
        result, fault = _attempt(action)
        self._raise_together(fault, *self.team.totals(fault is not None))
        return result  # type: ignore[return-value]

    def _raise_together(self, fault: Exception | None, faults: float) -> None:
        if faults:
            raise fault or SystemExit(1)

    def tell_of(self, bad: list[Bad]) -> None:
        """Writes replaced samples down in `bad_samples.jsonl`, and on stderr each once; empties the list."""
        for each in bad:
            line = json.dumps({"rank": self.team.rank, **each._asdict()})
            self.bad_last = each
            if self.bad_log:
                with open(self.bad_log, "a") as file:
                    file.write(line + "\n")
            if (each.shard, each.row) not in self.bad_seen and len(self.bad_seen) < TOLD:
                self.bad_seen.add((each.shard, each.row))
                print(f"styleloom train: {told(each)} It is replaced.", file=sys.stderr, flush=True)
        bad.clear()

    def data_workers(self) -> int:
        """Processes that read and decode for this one."""
        wanted = self.run.data.workers
        return wanted if wanted >= 0 else min(max(default_workers() // self.team.local_world - 1, 1), 8)

    def passes(self, phase: Phase, images: Tensor, labels: Tensor) -> list[Batch]:
        """This process's rows of a phase, split into passes; `images` and `labels` are its rows of the iteration, one
        set of them after the other."""
        world, parts = self.team.world, self.run.passes
        images, labels = (x.chunk(self.recipe.reals)[phase.reals] for x in (images, labels))
        out = []
        for part in range(parts):
            rows = own_rows(phase.batch, self.team.rank, world, part, parts)
            mine = slice(part, part + len(rows) * parts, parts)
            draws = Draws(self.draw_seed, phase.name, [self.nimg + row for row in rows], self.team.device)
            out.append(Batch(images[mine], labels[mine], draws))
        return out

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images -> fp32 in [-1, 1], as the discriminator gets to see them; labels -> one-hot [n, c_dim]; on this
        process's device."""
        device = self.team.device
        x = self.recipe.shown(images.to(device, non_blocking=True).float() / 127.5 - 1)
        c_dim = self.recipe.c_dim
        if not c_dim:
            return x, torch.zeros(len(x), 0, device=device)
        return x, nn.functional.one_hot(labels.to(device, non_blocking=True), c_dim).float()

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One iteration on this process's uint8 images and int labels: all phases that are due, then the average."""
        self.follow()
        run, recipe, batch = self.run, self.recipe, self.stage.batch
        report.report("alpha", recipe.alpha)
        if self.replaced is not None:
            report.report("data/replaced", self.replaced)
        reals, classes = self.to_device(images, labels)
        for phase in recipe.phases:
            if schedule.due(self.nimg, batch, phase.interval):
                self.run_phase(phase, reals, classes)
        e, network = run.ema, recipe.networks[recipe.averaged]
        ramp, warmup = (None, 0.0) if run.init else (e.ramp, e.warmup_kimg * 1000)  # not to forget a snapshot early
        beta = schedule.ema_beta(self.nimg, batch, e.half_life_kimg * 1000, ramp, e.decay, warmup)
        ema.update_average(self.average, network, beta)
        for sigma_rel, average in self.averages.items():
            ema.update_parameters(average, network, phema.beta(sigma_rel, self.nimg + batch, batch))
        if self.team.device.type == "cpu":
            give_back_freed_memory()
        self.nimg += batch
        self.team.place.nimg = self.nimg

    def follow(self) -> None:
        """Brings the networks to where the schedule is at `nimg`; optimizers begin anew at another stage."""
        recipe, levels = self.recipe, self.recipe.levels
        stage, alpha = schedule.stage(self.run, levels, self.nimg), schedule.alpha(self.run, levels, self.nimg)
        if stage == recipe.stage:
            recipe.fade(alpha)
        else:
            self.team.place.at(f"going over to {self.px(stage.level)} px")
            names = list(self.updaters)
            for updater in self.updaters.values():
                updater.close()
            self.updaters = {}
            recipe.enter(stage, alpha)
            give_back_freed_memory(every=0.0)  # blocks of other sizes will not be needed again
            if self.team.device.type == "cuda":
                torch.cuda.empty_cache()
            self.updaters = {name: self._updater(name) for name in names}
        self.average.grow_to(stage.level, alpha)
        recipe.at(self.nimg)

    def run_phase(self, phase: Phase, reals: Tensor, classes: Tensor) -> None:
        """Runs a phase; raises Trouble where its gradients have not been finite for too many times in a row."""
        run, recipe = self.run, self.recipe
        passes = self.passes(phase, reals, classes)
        self.team.place.at(f"phase {phase.name}")
        stepped = run_phase(phase, recipe.networks, self.updaters[phase.trains], passes)
        self.skipped[phase.name] = 0 if stepped else self.skipped.get(phase.name, 0) + 1
        if self.skipped[phase.name] >= run.health.patience:
            self.diverged(phase.name)

    def diverged(self, phase: str) -> None:
        """A phase has left out `health.patience` steps in a row: raises Trouble where that interrupts the run."""
        action, times = self.run.health.nonfinite, self.skipped[phase]
        found = health.not_finite(phase, times, self.nimg, action, self.gentler)
        if action in health.INTERRUPTS:
            raise health.Trouble(found)
        if action == "warn" and times == self.run.health.patience:
            self._tell(found.message)

    @property
    def gentler(self) -> str:
        """The change of the run's fields that makes training calmer, in words."""
        growth = self.run.growth
        return f"a lower {'growth.lr' if growth.gpus or growth.lr else 'recipe.lr'} or a higher {self.recipe.penalty}"

    def states(self) -> checkpoint.States:
        """Everything that changes while training, by name. To be called by all processes."""
        networks, ends = self.recipe.networks, self.stage_ends()  # then the optimizers begin anew
        return {
            **{name: network.state_dict() for name, network in networks.items()},
            f"{self.recipe.averaged}_ema": self.average.state_dict(),
            **{f"{self.recipe.averaged}_{phema.name(width)}": x for width, x in self.averages.items()},
            **{f"optimizer_{name}": {} if ends else updater.state() for name, updater in self.updaters.items()},
            "recipe": self.recipe.state_dict(),
            "report": report.Report.state_dict(),
        }

    def check_replicas(self) -> None:
        """Raises ValueError if networks and average are not the same, bit by bit, on all processes."""
        self.team.place.at("comparing the networks")
        networks = {**self.recipe.networks, "average": self.average}
        states = {name: network.state_dict() for name, network in networks.items()}
        states |= {phema.name(width): average for width, average in self.averages.items()}
        tensors = {f"{a}.{b}": x for a, state in states.items() for b, x in state.items()}
        if self.team.world > 1:
            check_replicas(self.team.rank, self.team.gather, tensors, self.nimg)

    def save(self, saver: Saver) -> None:
        """Begins to write a checkpoint, once the one before is written. To be called by all processes."""
        self.saved(saver)
        self.check_replicas()
        self.team.place.at("saving")
        report.Report.merge(self.team.sum_named, self.team.main)
        states, run = self.states(), self.run
        if self.team.main:
            meta = {
                "nimg": self.nimg,
                "seconds": self.seconds,
                "processes": self.team.world,
                "data_hash": self.data_hash,
                "skipped": dict(self.skipped),
            }
            well = self.well
            folder, keep_every = Path(run.out) / "checkpoints", round(run.keep_every_kimg * 1000)
            saver.submit(
                states, lambda host: checkpoint.save(folder, host, meta, run, run.keep_checkpoints, keep_every, well)
            )

    def begin(self) -> None:
        """Goes on from the newest good checkpoint in the run's folder, or begins, from `init` where given.

        Raises ValueError if the checkpoint is of another run or data set, if the processes do not see the same one, or
        if the snapshot does not fit.
        """
        found = checkpoint.newest_good(Path(self.run.out) / "checkpoints", self._tell) if self.run.out else None
        optimizers: dict[str, State] = {}
        self.rollbacks = len(health.read_rollbacks(Path(self.run.out))) if self.run.out else 0
        if found:
            optimizers = self.restore(*found)
        elif self.run.init:
            size = (self.width, self.height, self.manifest.channels)
            from_snapshot(self.run, self.recipe, self.average, size, self._tell)
        starts = self.team.gather([(self.nimg, self.rollbacks, self.data_hash)])
        if len(set(starts)) > 1:
            raise ValueError(
                "the processes do not see the same files: they begin at "
                f"{sorted({nimg for nimg, *_ in starts})} images. "
                "--out and --data.path have to be folders that all nodes share."
            )
        if self.run.parallel.strategy == "deepspeed" and self.team.world == 1:
            print("Note: one process has nothing to divide, so parallel.strategy deepspeed makes no difference.")
        self.follow()
        self.updaters = {name: self._updater(name) for name in self.recipe.networks}
        for name, state in optimizers.items():
            self.updaters[name].load(state)

    def _tell(self, text: str) -> None:
        if self.team.main:
            print(f"styleloom train: {text}", file=sys.stderr, flush=True)

    def _updater(self, name: str) -> Updater:
        """What makes the steps of a network's optimizer. (An engine has to be built around weights that are there.)"""
        p, team = self.run.parallel, self.team
        network, optimizer = self.recipe.networks[name], self.recipe.optimizers[name]
        parts = self._parts(name) if p.strategy == "deepspeed" and team.world > 1 else []
        network.requires_grad_(True)  # engines and hooks leave out what has it not
        if parts:
            return Divided(team, network, optimizer, p.zero_stage, parts)
        overlap = p.overlap == "on" or (p.overlap == "auto" and team.world > team.local_world)
        gradient = sum(x.numel() * x.element_size() for _, x in network.active())
        # At least some six buckets: the last one is not hidden by the backward pass.
        return Replicated(team, network, optimizer, math.ceil(min(p.bucket_mb * 1e6, gradient / 6)) if overlap else 0)

    def _parts(self, name: str) -> list[list[nn.Parameter]]:
        """A network's parameters that are at work, those together that the same phases reach."""
        n, network = self.run.network.mbstd_group, self.recipe.networks[name]
        images = torch.zeros(n, self.manifest.channels, *self.recipe.G.size, device=self.team.device)
        labels = torch.zeros(n, self.recipe.c_dim, device=self.team.device)
        reach = [
            reached(phase, self.recipe.networks, Batch(images, labels, Draws(0, phase.name, range(n), images.device)))
            for phase in self.recipe.phases
            if phase.trains == name
        ]
        parts: dict[tuple[bool, ...], list[nn.Parameter]] = {}
        for parameter, p in network.active():
            parts.setdefault(tuple(parameter in names for names in reach), []).append(p)
        return list(parts.values())

    def restore(self, folder: Path, states: checkpoint.States, meta: dict[str, Any], run: Run) -> dict[str, State]:
        """Goes back to a checkpoint, but for the optimizers, whose states by network it returns.

        Raises ValueError if it is of another run or data set.
        """
        differences = protected_differences(run, self.run)
        if differences:
            raise ValueError(
                f"{self.run.out} holds a run with other settings: {'; '.join(differences)}.\n"
                "Give the same ones to go on with it, or another --out to begin a new run."
            )
        if meta["data_hash"] != self.data_hash:
            sizes = " (with the sets of smaller sizes in it)" if len(self.data) > 1 else ""
            raise ValueError(
                f"the data set at {self.run.data.path}{sizes} is not the one that the run in {self.run.out} began "
                "with. Give the same one to go on, or another --out to begin a new run."
            )
        networks = self.recipe.networks
        for name, network in networks.items():
            checkpoint.fill(network, states[name], folder)
        checkpoint.fill(self.average, states[f"{self.recipe.averaged}_ema"], folder)
        for width, average in self.averages.items():
            stored = states[f"{self.recipe.averaged}_{phema.name(width)}"]
            torch._foreach_copy_(list(average.values()), [stored[name] for name in average])
        self.recipe.load_state_dict(states["recipe"])
        report.Report.load_state_dict(states["report"] if self.team.main else {})
        self.nimg, self.seconds, self.resumed_from = meta["nimg"], meta["seconds"], folder
        self.skipped = dict(meta["skipped"])
        self.team.place.nimg = self.nimg
        if self.team.main:
            print(f"Going on from {folder}: {self.nimg / 1000:g} kimg.", flush=True)
            if meta["processes"] != self.team.world:
                print(f"It was written by {meta['processes']} processes; now there are {self.team.world}.", flush=True)
        return {name: states[f"optimizer_{name}"] for name in networks}


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """(what it returned, what it raised)."""
    try:
        return action(), None
    except (ValueError, OSError) as error:
        return None, error


def versions() -> dict[str, str]:
    """Of what has to be the same on all processes."""
    styleloom = f"{importlib.metadata.version('styleloom')} ({code_version()})"
    return {"styleloom": styleloom, "torch": torch.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
