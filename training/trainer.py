"""All that trains, as one object: the data set, the recipe with its networks, the average, and how far it has come."""

from collections.abc import Generator
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ..datasets.manifest import Manifest, check_shard, read_manifest
from ..datasets.stream import batches
from ..datasets.verify import hash_faults
from ..datasets.workers import default_workers
from ..ops.memory import give_back_freed_memory, keep_freed_memory
from . import checkpoint, ema, recipes, report, schedule
from .config import Run, protected_differences
from .distributed import Team
from .draws import Draws
from .phases import Batch, Phase, own_rows, run_phase

HASHED_BELOW = 2 * 2**30  # bytes of shards that `data.verify` auto re-hashes at the start of a run
PATIENCE = 10  # runs of a phase in a row with non-finite gradients, after which training stops


class Training:
    """All that trains: the data set, the recipe with its networks, the average, and how far it has come."""

    def __init__(self, run: Run, team: Team) -> None:
        self.run, self.team = run, team
        self.manifest = m = open_data(run, team)
        self._check_split()
        if team.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        else:
            keep_freed_memory()
            if run.precision == "fp16" and team.main:
                print("Note: fp16 on a CPU is many times slower than --precision fp32.", flush=True)
        class_counts = m.class_counts if run.data.labels else []
        self.recipe = recipes.build(run, m.width, m.height, m.channels, class_counts, team.device)
        self.average = ema.average_of(self.recipe.networks[self.recipe.averaged])
        self.nimg = 0
        self.seconds = 0.0  # of training, over all tries
        self.skipped: dict[str, int] = {}  # steps left out in a row, by phase

    def _check_split(self) -> None:
        run, world = self.run, self.team.world
        each, rest = divmod(run.batch, world * run.passes)
        if rest or each % run.network.mbstd_group:
            raise ValueError(
                f"batch {run.batch} over {world} processes in {run.passes} passes leaves "
                f"{run.batch / world / run.passes:g} images a pass, which has to be a multiple of network.mbstd_group "
                f"{run.network.mbstd_group}: change batch, passes or network.mbstd_group"
            )

    def stream(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This process's share of the batches from `nimg` on."""
        d = self.run.data
        return batches(
            d.path,
            self.manifest,
            seed=self.run.seed,
            start=self.nimg,
            batch=self.run.batch,
            rank=self.team.rank,
            world=self.team.world,
            mirror=d.mirror,
            workers=self.data_workers(),
            window=d.window,
            pin_memory=self.team.device.type == "cuda",
        )

    def data_workers(self) -> int:
        """Processes that read and decode for this one."""
        wanted = self.run.data.workers
        return wanted if wanted >= 0 else min(max(default_workers() // self.team.local_world - 1, 1), 8)

    def passes(self, phase: Phase, images: Tensor, labels: Tensor) -> list[Batch]:
        """This process's rows of a phase, split into passes; `images` and `labels` are its rows of the iteration."""
        world, parts = self.team.world, self.run.passes
        out = []
        for part in range(parts):
            rows = own_rows(phase.batch, self.team.rank, world, part, parts)
            mine = slice(part, part + len(rows) * parts, parts)
            draws = Draws(self.run.seed, phase.name, [self.nimg + row for row in rows], self.team.device)
            out.append(Batch(images[mine], labels[mine], draws))
        return out

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images -> fp32 in [-1, 1]; labels -> one-hot [n, c_dim]; on this process's device."""
        device = self.team.device
        x = images.to(device, non_blocking=True).float() / 127.5 - 1
        c_dim = self.recipe.c_dim
        if not c_dim:
            return x, torch.zeros(len(x), 0, device=device)
        return x, nn.functional.one_hot(labels.to(device, non_blocking=True), c_dim).float()

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One iteration on this process's uint8 images and int labels: all phases that are due, then the average."""
        run, recipe = self.run, self.recipe
        reals, classes = self.to_device(images, labels)
        for phase in recipe.phases:
            if schedule.due(self.nimg, run.batch, phase.interval):
                self.run_phase(phase, reals, classes)
        ramp = None if run.init else run.ema.ramp  # a snapshot's weights are not to be forgotten early
        beta = schedule.ema_beta(self.nimg, run.batch, run.ema.half_life_kimg * 1000, ramp)
        ema.update_average(self.average, recipe.networks[recipe.averaged], beta)
        if self.team.device.type == "cpu":
            give_back_freed_memory()
        self.nimg += run.batch

    def run_phase(self, phase: Phase, reals: Tensor, classes: Tensor) -> None:
        """Runs a phase; raises ValueError when its gradients have not been finite many times in a row."""
        recipe = self.recipe
        passes = self.passes(phase, reals, classes)
        sum_ = self.team.sum_ if self.team.world > 1 else None
        stepped = run_phase(phase, recipe.networks, recipe.optimizers[phase.trains], passes, sum_)
        self.skipped[phase.name] = 0 if stepped else self.skipped.get(phase.name, 0) + 1
        if self.skipped[phase.name] >= PATIENCE:
            raise ValueError(
                f"the gradients of phase {phase.name} were not finite {PATIENCE} times in a row, at {self.nimg} "
                "images: training has diverged. Begin anew (--init from a snapshot before it) with a lower recipe.lr "
                "or a higher recipe.r1_gamma."
            )

    def states(self) -> checkpoint.States:
        """Everything that changes while training, by name."""
        networks = self.recipe.networks
        return {
            **{name: network.state_dict() for name, network in networks.items()},
            f"{self.recipe.averaged}_ema": self.average.state_dict(),
            **{
                f"optimizer_{name}": checkpoint.optimizer_state(optimizer, networks[name])
                for name, optimizer in self.recipe.optimizers.items()
            },
            "recipe": self.recipe.state_dict(),
            "report": report.Report.state_dict(),
        }

    def save(self) -> None:
        """Writes a checkpoint. To be called by all processes."""
        report.Report.merge(self.team.sum_named, self.team.main)
        if self.team.main:
            meta = {
                "nimg": self.nimg,
                "seconds": self.seconds,
                "processes": self.team.world,
                "data_hash": self.manifest.hash,
            }
            folder = Path(self.run.out) / "checkpoints"
            checkpoint.save(folder, self.states(), meta, self.run, self.run.keep_checkpoints)
        self.team.wait()

    def begin(self) -> None:
        """Goes on from the newest checkpoint in the run's folder, or begins, from `init` where given.

        Raises ValueError if the checkpoint is of another run or data set, if the processes do not see the same one, or
        if the snapshot does not fit.
        """
        checkpoints = checkpoint.complete(Path(self.run.out) / "checkpoints") if self.run.out else []
        if checkpoints:
            self.restore(checkpoints[-1])
        elif self.run.init:
            self.initialise(Path(self.run.init))
        starts = self.team.gather([(self.nimg, self.manifest.hash)])
        if len(set(starts)) > 1:
            raise ValueError(
                "the processes do not see the same files: they begin at "
                f"{sorted({nimg for nimg, _ in starts})} images. "
                "--out and --data.path have to be folders that all nodes share."
            )

    def restore(self, folder: Path) -> None:
        """Goes back to a checkpoint. Raises ValueError if it is of another run or data set."""
        states, meta, run = checkpoint.load(folder)
        differences = protected_differences(run, self.run)
        if differences:
            raise ValueError(
                f"{self.run.out} holds a run with other settings: {'; '.join(differences)}.\n"
                "Give the same ones to go on with it, or another --out to begin a new run."
            )
        if meta["data_hash"] != self.manifest.hash:
            raise ValueError(
                f"the data set at {self.run.data.path} is not the one that the run in {self.run.out} began with. "
                "Give the same one to go on, or another --out to begin a new run."
            )
        networks = self.recipe.networks
        for name, network in networks.items():
            checkpoint.fill(network, states[name], folder)
            checkpoint.load_optimizer_state(self.recipe.optimizers[name], network, states[f"optimizer_{name}"])
        checkpoint.fill(self.average, states[f"{self.recipe.averaged}_ema"], folder)
        self.recipe.load_state_dict(states["recipe"])
        report.Report.load_state_dict(states["report"] if self.team.main else {})
        self.nimg, self.seconds = meta["nimg"], meta["seconds"]
        if self.team.main:
            print(f"Going on from {folder}: {self.nimg / 1000:g} kimg.", flush=True)
            if meta["processes"] != self.team.world:
                print(f"It was written by {meta['processes']} processes; now there are {self.team.world}.", flush=True)

    def initialise(self, path: Path) -> None:
        """Takes the networks' weights from a snapshot. Raises ValueError if they do not fit."""
        folder = checkpoint.find_snapshot(path)
        about, m = checkpoint.read_snapshot(folder), self.manifest
        mine = (m.width, m.height, m.channels, self.recipe.c_dim)
        its = (about["width"], about["height"], about["channels"], len(about["class_names"]))
        for what, a, b in zip(("width", "height", "channels", "classes"), its, mine, strict=True):
            if a != b:
                raise ValueError(
                    f"the snapshot {folder} has {what} {a}, this run {b}: prepare the data set to match, or leave out "
                    "--init"
                )
        generator = checkpoint.read_tensors(folder / "generator.safetensors")
        checkpoint.fill(self.recipe.networks[self.recipe.averaged], generator, folder)
        checkpoint.fill(self.average, generator, folder)
        if (folder / "discriminator.safetensors").exists():
            discriminator = checkpoint.read_tensors(folder / "discriminator.safetensors")
            checkpoint.fill(self.recipe.networks[self.recipe.discriminator], discriminator, folder)

    def snapshot(self, writer: report.Writer) -> Path:
        """Writes a snapshot and a grid of samples. For the main process."""
        m, run = self.manifest, self.run
        names = m.class_names if run.data.labels else []
        checkpoint.save_snapshot(
            Path(run.out) / "snapshots", self.average, self.recipe.networks[self.recipe.discriminator], run,
            self.nimg, m.width, m.height, m.channels, names,
        )  # fmt: skip
        return writer.picture(f"fakes-{self.nimg:09d}", self.sample_grid(), self.nimg)

    @torch.no_grad()
    def sample_grid(self) -> Image:
        """Images of the averaged generator from latents that stay the same throughout the run."""
        columns = grid_columns(self.manifest.width)
        draws = Draws(self.run.seed, "grid", range(columns**2), self.team.device)
        z, labels = draws.normal(self.recipe.z_dim), self.recipe.labels(draws)
        images = [self.average(a, b) for a, b in zip(z.split(16), labels.split(16), strict=True)]
        return report.image_grid(report.to_uint8(torch.cat(images)), columns)

    def real_grid(self) -> Image:
        """The first images of the stream."""
        columns = grid_columns(self.manifest.width)
        images, _ = next(batches(self.run.data.path, self.manifest, seed=self.run.seed, start=0, batch=columns**2))
        return report.image_grid(images, columns)


def grid_columns(width: int) -> int:
    """Columns (and rows) of a sample grid about 2048 px wide, 4 to 8."""
    return min(max(2048 // width, 4), 8)


def open_data(run: Run, team: Team) -> Manifest:
    """The manifest of the run's data set, its shards checked as `data.verify` says.

    Raises ValueError, the same on every process, if it is missing, half-written, changed, or lacks the labels.
    """
    fault, manifest = "", None
    try:
        if not run.data.path:
            raise ValueError("no data set given: --data.path DATASET, a folder made by styleloom prepare")
        manifest = read_manifest(run.data.path)
        if run.data.labels and not manifest.classes:
            raise ValueError(
                f"data.labels asks for a class-conditional run, but {run.data.path} has no labels: "
                "prepare it with --labels, or leave data.labels out"
            )
        for shard in manifest.shards:
            check_shard(run.data.path, shard)
        hashed = run.data.verify == "hash" or (run.data.verify == "auto" and manifest.bytes < HASHED_BELOW)
        if hashed and team.main:
            faults = hash_faults(run.data.path, manifest)
            if faults:
                raise ValueError(
                    f"{run.data.path}/{faults[0].file}: {faults[0].what}. `styleloom inspect {run.data.path} --verify` "
                    "lists all faults; prepare the data set again."
                )
    except (ValueError, OSError) as error:
        fault = str(error)
    faults = [message for message in team.gather([fault]) if message]
    if faults:
        raise ValueError(faults[0])
    assert manifest is not None
    return manifest
