"""The same training on 1, 2, 3 or 4 ranks (worlds.py), and going on with another number and another strategy."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from styleloom.training.checkpoint import complete, load

LONG = [
    "--batch=24", "--data.window=5", "--checkpoint-kimg=0.6", "--snapshot-kimg=1.2", "--tick-kimg=0.6",
    "--recipe.pl-interval=4", "--recipe.r1-interval=6",
]  # fmt: skip
STEPS = 1.2  # kimg: 50 steps
ZERO = ["--parallel.strategy=deepspeed", "--parallel.zero-stage"]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, unlabelled, arguments, python):
    """A folder of runs: wN on N ranks, in float64; from-2-on-N went on, on N ranks, with the first half of w2.
    zero-2, on 2 ranks, and alone are short, in fp32; zero-2-on-N went on with zero-2 on N ranks."""
    root = tmp_path_factory.mktemp("worlds")

    def spec(name: str, ranks: int, *more: str, double: bool = True, kimg: float = STEPS) -> dict:
        its = arguments(unlabelled, root / name, *LONG, f"--total-kimg={kimg}", "--keep-checkpoints=9", *more)
        return {"ranks": ranks, "double": double, "arguments": its}

    short = {"double": False, "kimg": 0.096}  # 4 steps: in fp32 small differences grow
    every = "--checkpoint-kimg=0.048"
    runs = [
        *(spec(f"w{n}", n) for n in (1, 2, 3, 4)),
        spec("half", 2, kimg=0.6),
        spec("alone", 1, every, **short),
        spec("zero-2", 2, every, *ZERO, "2", double=False, kimg=0.048),
    ]
    begin(python, root, runs)
    copies = {"from-2-on-1": "half", "from-2-on-3": "half", "zero-2-on-1": "zero-2", "zero-2-on-3": "zero-2"}
    for name, source in copies.items():
        shutil.copytree(root / source, root / name)
    runs = [
        spec("from-2-on-1", 1),
        spec("from-2-on-3", 3),
        spec("zero-2-on-1", 1, every, **short),
        spec("zero-2-on-3", 3, every, *ZERO, "1", **short),
    ]
    (root / "said.txt").write_text(begin(python, root, runs))
    return root


def begin(python, root: Path, runs: list[dict]) -> str:
    (root / "spec.json").write_text(json.dumps(runs))
    process = python(Path(__file__).with_name("worlds.py"), root / "spec.json")
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, out[-2000:] + err[-4000:]
    return out


def furthest(a: Path, b: Path) -> float:
    """The largest difference of any tensor of two checkpoints, relative to the tensor's size."""
    (x, *_), (y, *_) = load(a), load(b)
    parts = [part for part in x if part != "report"]
    assert len(parts) > 5
    for part in parts:
        assert x[part].keys() == y[part].keys()
    pairs = [(x[part][name].double(), y[part][name].double()) for part in parts for name in x[part]]
    return max(float((p - q).norm() / (q.norm() + 1e-6)) for p, q in pairs)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_trains_the_same_networks(worlds, ranks):
    """After 25 and after 50 steps: weights, averages, optimizers, means."""
    one, other = (complete(worlds / name / "checkpoints") for name in ("w1", f"w{ranks}"))
    assert [path.name for path in other] == ["nimg-000000600", "nimg-000001200"] == [path.name for path in one]
    assert 0 < furthest(other[0], one[0]) < 1e-9  # not 0: the sums are in another order
    assert furthest(other[1], one[1]) < 1e-7
    assert furthest(one[1], one[0]) > 1e-2


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_of_two_ranks_goes_on_with_another_number(worlds, ranks):
    went_on, whole = (complete(worlds / name / "checkpoints")[-1] for name in (f"from-2-on-{ranks}", "w2"))
    assert went_on.name == whole.name == "nimg-000001200"
    assert furthest(went_on, whole) < 1e-7
    assert f"It was written by 2 processes; now there are {ranks}." in (worlds / "said.txt").read_text()


def test_deepspeeds_checkpoint_is_that_of_any_strategy(worlds):
    zero, alone = (complete(worlds / name / "checkpoints")[0] for name in ("zero-2", "alone"))
    assert zero.name == alone.name == "nimg-000000048"
    assert furthest(zero, alone) < 1e-3


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_of_deepspeed_goes_on_with_another_number_of_ranks_and_another_strategy(worlds, ranks):
    """On 1 rank without engines; on 3 with another stage."""
    went_on, alone = (complete(worlds / name / "checkpoints")[-1] for name in (f"zero-2-on-{ranks}", "alone"))
    assert went_on.name == alone.name == "nimg-000000096"
    assert furthest(went_on, alone) < 1e-2


def test_the_steps_of_an_optimizer_survive_the_change(worlds):
    """A parameter that path length does not reach is a step behind."""
    states, *_ = load(complete(worlds / "zero-2-on-3" / "checkpoints")[-1])
    steps = states["optimizer_G"]
    assert (steps["synthesis.b16.torgb.weight:step"], steps["synthesis.b16.torgb.bias:step"]) == (5, 4)
    assert torch.equal(steps["synthesis.b16.torgb.bias:step"], torch.tensor(4.0))
