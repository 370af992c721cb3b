"""Trainings on several numbers of ranks, one after the other: `worlds.py SPEC.json`

The spec is a list of {"ranks": N, "double": bool, "arguments": [of styleloom train]}. Ranks are forked from this
process, so that all of them together pay for one import of torch. A double training calculates in float64 throughout,
where what ranks do in another order differs by 1e-16 and not, after Adam's first steps, by a sign.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor

from styleloom.scripts import train
from styleloom.training.config import Run
from styleloom.training.distributed import Team
from styleloom.training.draws import Draws
from styleloom.training.recipes.stylegan2 import StyleGAN2
from styleloom.training.trainer import Training


def in_double() -> None:
    """All of a training in float64."""
    init, to_device, normal, uniform = Training.__init__, Training.to_device, Draws.normal, Draws.uniform

    def made(self: Training, run: Run, team: Team) -> None:
        init(self, run, team)
        for network in [*self.recipe.networks.values(), self.average]:
            network.double()
        for average in self.averages.values():
            average |= {name: x.double() for name, x in average.items()}
        if isinstance(self.recipe, StyleGAN2):
            self.recipe.pl_mean = self.recipe.pl_mean.double()

    def moved(self: Training, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x, c = to_device(self, images, labels)
        return x.double(), c.double()

    Training.__init__ = made
    Training.to_device = moved
    Draws.normal = lambda self, *shape: normal(self, *shape).double()
    Draws.uniform = lambda self, *shape: uniform(self, *shape).double()


def rank(number: int, spec: dict, port: int) -> int:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(spec["ranks"]),
        "LOCAL_WORLD_SIZE": str(spec["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    if spec["double"]:
        in_double()
    return train.main(spec["arguments"]) or 0


def launch(spec: dict) -> None:
    """Runs one training to its end. Raises RuntimeError if a rank failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    ranks = []
    for number in range(spec["ranks"]):
        if not (child := os.fork()):
            status = 1
            try:
                status = rank(number, spec, port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        ranks.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
    if any(statuses):
        raise RuntimeError(f"{spec['arguments']} on {spec['ranks']} ranks ended with {statuses}")


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        print(f"== {each['ranks']} ranks: {each['arguments']}", flush=True)
        launch(each)
