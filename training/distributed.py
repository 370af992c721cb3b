"""Processes and devices. The only file that imports accelerate (and, later, deepspeed)."""

import datetime
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor


class Team:
    """The processes that train together, one device each. Networks are not wrapped: gradients are summed by `sum_`."""

    def __init__(self) -> None:
        cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        patience = InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=30))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patience])
        wanted = int(os.environ.get("WORLD_SIZE", 1))
        if self.accelerator.num_processes != wanted:
            # Otherwise each process would train alone, without a word, and write over the others' files.
            raise ValueError(
                f"{wanted} processes were launched but only {self.accelerator.num_processes} joined. On CPU start them "
                "with ACCELERATE_USE_CPU=true and accelerate launch --multi_gpu --num_processes N, or torchrun."
            )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world)
        self.local_rank = int(os.environ.get("LOCAL_RANK") or self.rank)
        self.main: bool = self.accelerator.is_main_process

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over all processes of a tensor of the same shape everywhere."""
        if self.world == 1:
            return x
        return self.accelerator.reduce(x, "sum")  # type: ignore[return-value]

    def totals(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        return self.sum_(torch.tensor(values, device=self.device)).tolist()

    def sum_named(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums of equally named and shaped tensors; a process without a name counts as zeros."""
        if self.world == 1:
            return values
        theirs = self.gather([{name: tuple(x.shape) for name, x in values.items()}])
        shapes = dict(sorted(item for each in theirs for item in each.items()))
        if not shapes:
            return {}
        zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        flat = torch.cat([values.get(name, zero).to(zero).flatten() for name, zero in zeros.items()])
        parts = self.sum_(flat.to(self.device)).split([zero.numel() for zero in zeros.values()])
        return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    def gather(self, objects: list[Any]) -> list[Any]:
        """The concatenation over all processes of lists of picklable objects."""
        return objects if self.world == 1 else gather_object(objects)

    def wait(self) -> None:
        """Returns once every process has come here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leaves the process group."""
        self.accelerator.end_training()
