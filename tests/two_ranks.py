"""What two ranks have to do for the tests, in one launch: `torchrun ... two_ranks.py RESULTS RUNS`, folders both

Each task writes what it found into RESULTS; conftest.py's `two_ranks` starts this file, and the tests judge.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from styleloom.training import report
from styleloom.training.config import Run, read_run
from styleloom.training.distributed import Team
from styleloom.training.loop import train
from styleloom.training.phases import run_phase
from styleloom.training.recipes.stylegan2 import StyleGAN2
from styleloom.training.trainer import Training
from styleloom.training.watchdog import Place


class Alone:
    """A team of one, for the same work in the same process."""

    rank, world, local_rank, local_world, main = 0, 1, 0, 1, True
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.place = Place()

    def sum_(self, x: Tensor) -> Tensor:
        return x

    def sum_named(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values

    def gather(self, objects: list) -> list:
        return objects


def away_from_zero(run: Run, team, dtype: torch.dtype) -> Training:
    """A training at 8 images whose parameters are all away from 0, so that no gradient vanishes by chance."""
    training = Training(run, team)
    assert isinstance(training.recipe, StyleGAN2)
    training.recipe.pl_mean = training.recipe.pl_mean.to(dtype).fill_(0.3)
    generator = torch.Generator().manual_seed(1)
    for network in training.recipe.networks.values():
        network.to(dtype)
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.1 * noise.to(dtype)
    training.begin()
    training.nimg = 8
    return training


def phase_results(run: Run, team, dtype: torch.dtype = torch.float64, spoil: bool = False) -> dict[str, Tensor]:
    """Of every phase, after its step: PHASE/NETWORK.PARAMETER:KEY -> the optimizer's state (exp_avg is the gradient, as
    beta1 is 0), PHASE/NETWORK.PARAMETER -> the weights, and what it leaves in the recipe.

    spoil: one pixel that only the last rank sees is not a number.
    """
    training = away_from_zero(run, team, dtype)
    reals, classes = training.to_device(*next(training.stream()))
    reals = reals.to(dtype)
    if spoil and team.rank == team.world - 1:
        reals[-1, 0, 3, 3] = float("nan")
    out = {}
    for phase in training.recipe.phases:
        network = training.recipe.networks[phase.trains]
        before = {name: x.clone() for name, x in network.state_dict().items()}
        updater = training.updaters[phase.trains]
        passes = training.passes(phase, reals, classes)
        report.Report.load_state_dict({})
        stepped = run_phase(phase, training.recipe.networks, updater, passes)
        weights = network.state_dict()
        found = {f"{phase.trains}.{name}": x for name, x in [*updater.state().items(), *weights.items()]}
        found |= {
            "stepped": torch.tensor(stepped),
            "rows": torch.tensor([len(part) for part in passes]),
            "bad": report.Report.state_dict()[f"nonfinite/{phase.name}"],
            "norm": report.Report.state_dict().get(f"grad_norm/{phase.name}", torch.zeros(3)),
            "changed": torch.tensor(any(not torch.equal(x, before[name]) for name, x in weights.items())),
            "w_avg": training.recipe.G.mapping.w_avg,
            "pl_mean": training.recipe.state_dict()["pl_mean"],
        }
        out |= {f"{phase.name}/{name}": x.clone() for name, x in found.items()}
    report.Report.load_state_dict({})
    return out


def gradients(
    results: Path, name: str, run: Run, team: Team, dtype: torch.dtype = torch.float64, spoil: bool = False
) -> None:
    """Files NAME-2-RANK of both ranks, and NAME-1 of the same work done alone."""
    save_file(phase_results(run, team, dtype, spoil), results / f"{name}-2-{team.rank}.safetensors")
    if team.main:
        save_file(phase_results(run, Alone(), dtype, spoil), results / f"{name}-1.safetensors")


def sums(results: Path, team: Team) -> None:
    """Sums over the ranks, of names that not all have."""
    mine: dict[str, Tensor] = {"both": torch.tensor([1.0, 2.0]) * (team.rank + 1)}
    mine[f"only {team.rank}"] = torch.full([2, 2], 7.0, dtype=torch.float64)
    found = {
        "named": {name: x.tolist() for name, x in team.sum_named(mine).items()},
        "nothing": team.sum_named({}),
        "totals": team.totals(team.rank == 1, 2.5, 0),
        "gathered": team.gather([f"of {team.rank}"]),
        "sum": team.sum_(torch.tensor([1.5, float(team.rank)], dtype=torch.float64)).tolist(),
        "world": [team.world, team.local_world, team.main],
    }
    (results / f"sums-{team.rank}.json").write_text(json.dumps(found))


def stopped(results: Path, run: Run, team: Team) -> None:
    """A run of which only the second rank is told to stop, at 28 images."""
    step = Training.step

    def stopping(self: Training, images: Tensor, labels: Tensor) -> None:
        step(self, images, labels)
        if self.nimg == 28 and team.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Training.step = stopping
    status = train(run, team)
    Training.step = step
    (results / f"stopped-{team.rank}.json").write_text(json.dumps(status))


def diverging(results: Path, run: Run, team: Team) -> None:
    """A run with a learning rate far too high from 44 images on, until it has gone back."""
    step, rollbacks = Training.step, []

    def stepping(self: Training, images: Tensor, labels: Tensor) -> None:
        for optimizer in self.recipe.optimizers.values() if self.nimg >= 44 and not self.rollbacks else ():
            optimizer.param_groups[0]["lr"] = 0.5
        step(self, images, labels)
        rollbacks.append(self.rollbacks)

    Training.step = stepping
    health = run.health.model_copy(update={"gap": "roll-back", "gap_limit": 5.0, "ticks": 1, "images": 8})
    short = {"total_kimg": 0.064, "snapshot_kimg": 9.0, "score_images": 0}
    status = train(run.model_copy(update={**short, "health": health, "out": str(results / "diverging")}), team)
    Training.step = step
    (results / f"diverging-{team.rank}.json").write_text(json.dumps([status, rollbacks[-1]]))


def main(results: Path, runs: Path) -> None:
    team = Team()

    def run(name: str) -> Run:
        return read_run(runs / f"{name}.json")

    tasks = {
        "sums": lambda: sums(results, team),
        "gradients": lambda: gradients(results, "gradients", run("gradients"), team),
        "labelled": lambda: gradients(results, "labelled", run("labelled"), team),
        "few": lambda: gradients(results, "few", run("few"), team),
        "ada": lambda: gradients(results, "ada", run("ada"), team),
        "spoilt": lambda: gradients(results, "spoilt", run("gradients"), team, spoil=True),
        "buckets": lambda: gradients(results, "buckets", run("buckets"), team),
        **{
            name: lambda name=name: gradients(results, name, run(name), team, torch.float32)
            for name in ("zero0", "zero1", "zero2", "zero1-passes", "zero2-few", "zero1-bf16")
        },
        "zero1-spoilt": lambda: gradients(results, "zero1-spoilt", run("zero1"), team, torch.float32, spoil=True),
        "whole": lambda: train(run("whole"), team),
        "resumed": lambda: train(run("killed"), team),
        "stopped": lambda: stopped(results, run("stopped"), team),
        "diverging": lambda: diverging(results, run("whole"), team),
    }
    for name, task in tasks.items():
        try:
            task()
        except Exception:
            (results / f"{name}-failed-{team.rank}.txt").write_text(traceback.format_exc())
            raise
    team.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
