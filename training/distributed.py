"""Processes, devices, and how a network's gradient becomes a step. The only file that imports accelerate or deepspeed.

Two strategies behind one interface (`Updater`): `Replicated`, in Accelerate's process group, and `Divided`, in
DeepSpeed's engines. Both leave the networks bare: a phase calls them as it likes, and differentiates them twice.
"""

import contextlib
import datetime
import gc
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from .watchdog import Place

State = dict[str, Tensor]


CONNECT = (
    "Where a host's own name does not lead to an address that the others can reach, GLOO_SOCKET_IFNAME (for GPUs "
    "NCCL_SOCKET_IFNAME) names the network interface to take; see docs/cluster.md"
)
GONE = "One of them has ended: look for what it said. The same command goes on from the newest checkpoint"


@contextlib.contextmanager
def lost(what: str, remedy: str) -> Iterator[None]:
    """What the backends raise of broken connections in the block becomes a ConnectionError of a line or two."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL", str(error), re.IGNORECASE):
            raise
        # Without the place in its sources, stacks and advice.
        text = re.sub(r"^\[[^]]*\] *", "", str(error).split("Exception raised from")[0])
        first = " ".join(text.split()).split(". This ")[0].rstrip(".")
        raise ConnectionError(f"{what}: {first[:200]}.\n{remedy}.") from None


class Team:
    """The processes that train together, one device each."""

    def __init__(self) -> None:
        cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        patience = InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=30))
        with (
            warnings.catch_warnings(),
            lost(f"process {os.environ.get('RANK', 0)} cannot reach the others", CONNECT),
        ):
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
        self.place = Place()
        """What this process is doing, for the watchdog's message."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what every process takes part in. Raises ConnectionError if one of them is gone."""
        with lost(f"process {self.rank} lost touch with the others", GONE), self.place.waiting():
            yield

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over all processes of a tensor of the same shape everywhere."""
        if self.world == 1:
            return x
        with self.together():
            return self.accelerator.reduce(x, "sum")  # type: ignore[return-value]

    def totals(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        if self.world == 1:
            return [float(value) for value in values]
        with self.together():  # until a device has its result
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
        if self.world == 1:
            return objects
        with self.together():
            return gather_object(objects)

    def close(self) -> None:
        """Leaves the process group."""
        self.accelerator.end_training()


class Updater(Protocol):
    """Makes steps of one network's optimizer with the gradient of the global batch.

    A step: `clear`, `add` for each pass, `reduce` once, then `step`, or nothing if the gradient was bad.
    """

    norm: Tensor
    """After `step`, the Euclidean norm of the gradient that it was made with: a scalar on the device, which nobody has
    waited for; the same on every process."""

    def clear(self) -> None:
        """Forgets the gradient."""
        ...

    def add(self, loss: Tensor | None, last: bool) -> None:
        """Adds the gradient of a pass's loss (a scalar; None: this process has no images in it). last: of the step."""
        ...

    def reduce(self, others: list[Tensor]) -> int:
        """Sums the gradient, and `others` in place, over the processes; how many elements are not finite, everywhere
        the same."""
        ...

    def step(self) -> None:
        """Changes the parameters. One without a gradient on any process keeps its value and its moments: Adam leaves
        it alone, which a zero gradient would not."""
        ...

    def state(self) -> State:
        """PARAMETER:KEY -> tensor of the whole optimizer, on the main process; not to be relied on elsewhere. To be
        called by every process. Hyper-parameters are not in it: they follow from the run."""
        ...

    def load(self, state: State) -> None:
        """The reverse of `state`, whatever strategy and number of processes wrote it."""
        ...

    def close(self) -> None:
        """Lets go of the network, which may get another updater."""
        ...


class Replicated:
    """Each process holds all of the network and of its optimizer; the gradient's sum over the processes is the same
    everywhere, and so is the step. Parameters of the network that are not the optimizer's are left alone.

    Args:
        bucket_bytes: 0: one flat all-reduce after the backward pass. Otherwise the gradient goes in parts of about
            this size, each as soon as it is complete, while the backward pass computes the others.
    """

    def __init__(self, team: Team, network: nn.Module, optimizer: Optimizer, bucket_bytes: int = 0) -> None:
        self.team, self.network, self.optimizer = team, network, optimizer
        self.parameters = parameters_of(optimizer)
        # From the last layer to the first: about the order in which gradients are complete.
        self.buckets = buckets(self.parameters[::-1], bucket_bytes if team.world > 1 else 0)
        self.sent: list[tuple[Tensor, dist.Work]] = []
        self.missing: list[int] = []  # gradients of each bucket; only in a step's last backward pass
        self.norm = torch.zeros([])
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _, i=i: self._has_come(i))
            for i, bucket in enumerate(self.buckets[:-1])
            for p in bucket
        ]

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def add(self, loss: Tensor | None, last: bool) -> None:
        if loss is not None:
            self.missing = [len(bucket) for bucket in self.buckets] if last else []
            loss.backward(inputs=self.parameters)
            self.missing = []

    def _has_come(self, i: int) -> None:
        """A gradient of bucket i is complete. Buckets are sent in their order, the same on every process."""
        if self.missing:
            self.missing[i] -= 1
            while len(self.sent) < len(self.buckets) - 1 and self.missing[len(self.sent)] == 0:
                self._send()

    def _send(self, *more: Tensor) -> None:
        """Begins to sum the next bucket's gradients (zeros for what has none), with `more` after them."""
        bucket = self.buckets[len(self.sent)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([x.flatten().to(bucket[0].dtype) for x in [*grads, *more]])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.sent.append((flat, work))

    def reduce(self, others: list[Tensor]) -> int:
        if self.team.world == 1:
            mine = [p.grad for p in self.parameters if p.grad is not None]
            self.norm, size = sizes(mine, others)
            return self._nonfinite(size.item(), mine, others)
        has = torch.tensor([p.grad is not None for bucket in self.buckets for p in bucket], device=self.team.device)
        with self.team.together():
            while len(self.sent) < len(self.buckets) - 1:
                self._send()
            self._send(*others, has)
            for _, work in self.sent:
                work.wait()
            sums, self.sent = [flat for flat, _ in self.sent], []
            shapes: list[list[Tensor]] = [[*bucket] for bucket in self.buckets]
            shapes[-1] += [*others, has]
            parts = [x for each, flat in zip(shapes, sums, strict=True) for x in like(each, flat)]
            gradient, rest = parts[: len(self.parameters)], parts[len(self.parameters) : -1]
            self.norm, size = sizes(gradient, rest)
            *present, size = torch.cat([parts[-1], size[None]]).tolist()  # one wait for both, until a device is done
        parameters = [p for bucket in self.buckets for p in bucket]
        for p, grad, any_ in zip(parameters, gradient, present, strict=True):
            p.grad = grad if any_ else None
        for x, its in zip(others, rest, strict=True):
            x.copy_(its)
        return self._nonfinite(size, gradient, rest)

    def _nonfinite(self, size: float, gradient: list[Tensor], others: list[Tensor]) -> int:
        """How many elements are not finite, where `size` is that of all (`sizes`): they are counted only if need be."""
        if math.isfinite(size):
            return 0
        bad = count_nonfinite(gradient, others)
        if not bad and gradient:  # the squares of something finite were too large
            self.norm = torch.stack(torch._foreach_norm(gradient, dtype=torch.float64)).norm()
        return bad

    def step(self) -> None:
        self.optimizer.step()

    def state(self) -> State:
        names: dict[Tensor, str] = {p: name for name, p in self.network.named_parameters()}
        return {f"{names[p]}:{key}": x for p, state in self.optimizer.state.items() for key, x in state.items()}

    def load(self, state: State) -> None:
        parameters = dict(self.network.named_parameters())
        self.optimizer.state.clear()
        for name, x in state.items():
            parameter, key = name.rsplit(":", 1)
            p = parameters[parameter]
            self.optimizer.state[p][key] = x.to(p.device) if key == "step" else torch.empty_like(p).copy_(x)

    def close(self) -> None:
        self.clear()
        for hook in self.hooks:
            hook.remove()


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer changes, which may be a part of a network's."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def buckets(parameters: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """The parameters in their order, cut into lists of at least `limit` bytes each, but for the last; 0: one list."""
    out: list[list[nn.Parameter]] = [[]]
    size = 0
    for p in parameters:
        if limit and size >= limit:
            out.append([])
            size = 0
        out[-1].append(p)
        size += p.numel() * p.element_size()
    return out


def like(tensors: list[Tensor], flat: Tensor) -> list[Tensor]:
    """The parts of a flat tensor in the shapes of others that follow one another in it."""
    parts = flat.split([x.numel() for x in tensors])
    return [part.reshape(x.shape) for part, x in zip(parts, tensors, strict=True)]


def sizes(gradient: list[Tensor], others: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(Euclidean norm of a gradient, size of it and of others together), two scalars, from one pass over the elements:
    the second is not finite if any of them is not (or if its square is beyond what the type can hold)."""
    tensors = [*gradient, *others]
    if not tensors:
        return torch.zeros([]), torch.zeros([])
    norms = torch.stack(torch._foreach_norm(tensors))  # each its own, as a sum of very many fp32 squares is inexact
    return norms[: len(gradient)].norm(), norms.sum()


def count_nonfinite(*lists: Sequence[Tensor | None]) -> int:
    """How many elements of the tensors are not finite."""
    tensors = [x for each in lists for x in each if x is not None]
    if not tensors:
        return 0
    if sizes([], tensors)[1].isfinite():  # one pass, and one wait, if all is well
        return 0
    return int(sum((~x.isfinite()).sum() for x in tensors))


class _Hand(torch.autograd.Function):
    """A parameter's way to a loss whose gradient is known already: it is handed over, without a copy."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gradient: list[Tensor]) -> Tensor:  # type: ignore[override]
        ctx.gradient = gradient
        return parameter.new_zeros([])

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gradient.pop(), None


class _Given(nn.Module):
    """What an engine takes for its model: a forward pass whose backward pass yields gradients computed before.

    So an engine sees one forward, one backward and one step, as it expects, whatever the phase did: several passes,
    a penalty's second derivatives, parameters that are not reached.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> Tensor:
        return torch.stack([_Hand.apply(p, [g]) for p, g in zip(parameters, gradients, strict=True)]).sum()


class Divided:
    """A DeepSpeed engine: nothing is divided over the processes (ZeRO 0), the optimizer's state (1), or also the summed
    gradient (2) (Rajbhandari et al. 2020, section 5). Every process holds its own gradient whole until it is summed.

    Args:
        stage: of ZeRO, 0 to 2. Stage 3 divides the parameters too, which a second derivative cannot be taken through.
        parts: the optimizer's parameters, those together that the same phases reach: Adam has to leave alone what a
            phase does not reach, and can do so only with whole parts of what it holds flat.
    """

    def __init__(
        self, team: Team, network: nn.Module, optimizer: Optimizer, stage: int, parts: list[list[nn.Parameter]]
    ) -> None:
        deepspeed = import_deepspeed(team.device)
        self.team, self.network, self.stage = team, network, stage
        self.parameters = parameters_of(optimizer)
        self.names = {p: name for name, p in network.named_parameters()}
        self.parts = parts
        self.idle: set[int] = set()  # parts that this step does not reach
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.reached: list[nn.Parameter] = []
        groups = [{"params": part, "part": i} for i, part in enumerate(self.parts)]
        self.given = optimizer
        self.optimizer = type(optimizer)(groups, **optimizer.defaults)  # type: ignore[call-arg]
        self.optimizer.register_step_pre_hook(self._before_step)
        self.norm = torch.zeros([])
        self.norms: list[Tensor] = []  # of what this process's optimizer steps with
        with team.together():  # engines agree among one another
            self.engine, *_ = self._initialize(deepspeed)

    def _initialize(self, deepspeed: Any) -> Any:
        return deepspeed.initialize(
            model=_Given(self.parameters),
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # it only counts with it
                # It takes a buffer of the bucket's size, by default 2 GB.
                "zero_optimization": {
                    "stage": self.stage,
                    "reduce_bucket_size": sum(p.numel() for p in self.parameters),
                },
                "gradient_clipping": 0.0,  # by default it clips to a norm of 1
                "zero_allow_untested_optimizer": True,
                "steps_per_print": None,
            },
        )

    def clear(self) -> None:
        self.gradients = {}

    def add(self, loss: Tensor | None, last: bool) -> None:
        if loss is None:
            return
        for p, g in zip(self.parameters, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
            if g is not None:  # never changed in place: it may be another's too
                self.gradients[p] = self.gradients[p] + g if p in self.gradients else g

    def reduce(self, others: list[Tensor]) -> int:
        """As in `Updater`; elements are counted before they are summed: the gradient's sum is the engine's."""
        has = torch.tensor([p in self.gradients for p in self.parameters], device=self.team.device)
        bad = torch.tensor(count_nonfinite(list(self.gradients.values()), others), device=self.team.device)
        tensors = [*others, has, bad]
        with self.team.together():  # until a device has its result
            *totals, present, count = like(tensors, self.team.sum_(torch.cat([x.flatten().double() for x in tensors])))
            self.reached = [p for p, any_ in zip(self.parameters, present.tolist(), strict=True) if any_]
        for x, total in zip(others, totals, strict=True):
            x.copy_(total)
        return int(count)

    def step(self) -> None:
        reached = set(self.reached)
        self.idle = {i for i, part in enumerate(self.parts) if reached.isdisjoint(part)}
        assert all(i in self.idle or reached.issuperset(part) for i, part in enumerate(self.parts))
        for group in self.optimizer.param_groups:  # the schedule may have moved them
            group |= {name: self.given.param_groups[0][name] for name in ("lr", "betas")}
        given = [self._given(p) for p in self.reached]
        with self.team.together():
            loss = self.engine(self.reached, given)
            del given
            self.engine.backward(loss)
            self.norms = []
            self.engine.step()
            square = torch.stack(self.norms).double().square().sum()
            self.norm = (self.team.sum_(square) if self.stage else square).sqrt()

    def _given(self, p: nn.Parameter) -> Tensor:
        """A parameter's gradient, as the engine wants it: it takes the mean over the processes."""
        gradient = self.gradients.pop(p, None)
        return torch.zeros_like(p) if gradient is None else gradient * self.team.world

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Before the optimizer's step, of one part or of all. The engine fills in zeros for what has no gradient: idle
        parts are left alone. The others' gradients are summed now, whole or (from stage 1 on) this process's fragment,
        and measured; the engine's own norm is there at some stages only."""
        for group in optimizer.param_groups:
            if group["part"] in self.idle:
                for p in group["params"]:
                    p.grad = None
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                self.norms += torch._foreach_norm(gradients)

    # The optimizer's state. At stages 1 and 2 it holds one flat tensor for each part, of which a process has a
    # fragment; where a parameter's numbers lie in it, the engine notes in `_hp_mapping`.

    def state(self) -> State:
        out: State = {}
        for group, part in zip(self.optimizer.param_groups, self.parts, strict=True):
            if self.stage == 0:
                out |= {f"{self.names[p]}:{key}": x for p in part for key, x in self.optimizer.state[p].items()}
                continue
            held = self.optimizer.state[group["params"][0]]
            for key, x in held.items():
                whole = [x] * len(part) if key == "step" else self._gathered(part, x)
                if self.team.main:
                    out |= {f"{self.names[p]}:{key}": each for p, each in zip(part, whole, strict=True)}
        return out

    def load(self, state: State) -> None:
        for group, part in zip(self.optimizer.param_groups, self.parts, strict=True):
            keys = sorted({name.rsplit(":", 1)[1] for name in state if name.rsplit(":", 1)[0] == self.names[part[0]]})
            for held in group["params"]:
                self.optimizer.state[held].clear()
            for key in keys:
                values = [state[f"{self.names[p]}:{key}"].to(self.team.device) for p in part]
                if self.stage == 0:
                    for p, x in zip(part, values, strict=True):
                        self.optimizer.state[p][key] = x.clone()
                elif key == "step":
                    self.optimizer.state[group["params"][0]][key] = values[0].clone()
                else:
                    self.optimizer.state[group["params"][0]][key] = self._own(group["params"][0], part, values)

    def close(self) -> None:
        self.clear()
        self.engine.destroy()
        # Once more, when it is collected, it would take the next engine's notes from the parameters.
        self.engine.destroy = lambda: None
        del self.engine, self.optimizer
        gc.collect()  # an engine holds itself, and copies of the parameters

    def _gathered(self, part: list[nn.Parameter], flat: Tensor) -> list[Tensor]:
        """A value for each parameter, on the CPU, from the fragments on all processes: one part at a time, as no device
        may have room for the whole."""
        out = torch.zeros(sum(p.numel() for p in part), dtype=flat.dtype, device=flat.device)
        whole = like(list(part), out)
        for p, x in zip(part, whole, strict=True):
            if (m := p._hp_mapping) is not None:  # type: ignore[attr-defined]
                _cut(x.view(-1), m.lp_fragment_address).copy_(_cut(flat, m.hp_fragment_address))
        return like(list(part), self.team.sum_(out).cpu())

    def _own(self, flat: Tensor, part: list[nn.Parameter], values: list[Tensor]) -> Tensor:
        """The reverse: this process's fragment of all."""
        out = torch.zeros_like(flat)
        for p, x in zip(part, values, strict=True):
            if (m := p._hp_mapping) is not None:  # type: ignore[attr-defined]
                _cut(out, m.hp_fragment_address).copy_(_cut(x.reshape(-1), m.lp_fragment_address))
        return out


def import_deepspeed(device: torch.device) -> Any:
    """The package, which takes seconds to import. Raises ValueError if it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found no other
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"parallel.strategy deepspeed: {error}. Take accelerate, or pip install deepspeed.") from None
    # Its operator for shared memory would be compiled for minutes, for nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _cut(flat: Tensor, address: Any) -> Tensor:
    return flat.narrow(0, address.start, address.numel)
