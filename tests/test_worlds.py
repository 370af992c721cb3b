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


# Growing: 4 px until 0.12 kimg, fading to 8 px until 0.204, 8 px until 0.312, fading to 16 px until 0.408.

GROWING = [
    "progressive-1024", "--network.z-dim=8", "--network.channel-base=64", "--network.mbstd-group=2",
    "--recipe.lr=0.002",
    "--growth.start=4", "--growth.gpus=0", "--growth.stabilise-kimg=0.1", "--growth.fade-kimg=0.1",
    "--growth.batch", "4", "24", "--batch=12", "--data.mirror", "--data.workers=0", "--data.window=5",
    "--checkpoint-kimg=0.06", "--snapshot-kimg=9", "--score-images=0", "--keep-checkpoints=99",
]  # fmt: skip
FADING = 180  # nimg, in the midst of the first fade


@pytest.fixture(scope="module")
def grown(tmp_path_factory, unlabelled, python):
    """A folder of runs that grow: gN on N ranks, in float64; again-2 and from-2-on-3 went on from the midst of g2's
    first fade. zero-N (DeepSpeed at that stage, on 2 ranks), overlap and alone are short, in fp32."""
    root = tmp_path_factory.mktemp("grown")

    def spec(name: str, ranks: int, *more: str, double: bool = True, kimg: float = 0.42) -> dict:
        its = [*GROWING, f"--data.path={unlabelled}", f"--out={root / name}", f"--total-kimg={kimg}", *more]
        return {"ranks": ranks, "double": double, "arguments": its}

    # A step or two of each stage, as in fp32 small differences grow.
    short = ["--growth.stabilise-kimg=0.02", "--growth.fade-kimg=0.02", "--checkpoint-kimg=0.012"]
    fp32 = {"double": False, "kimg": 0.096}
    runs = [
        *(spec(f"g{n}", n) for n in (1, 2, 3)),
        spec("alone", 1, *short, **fp32),
        spec("overlap", 2, *short, "--parallel.overlap=on", "--parallel.bucket-mb=0.002", **fp32),
        *(spec(f"zero-{stage}", 2, *short, *ZERO, str(stage), **fp32) for stage in (1, 2)),
    ]
    begin(python, root, runs)
    for name in ("again-2", "from-2-on-3"):
        shutil.copytree(root / "g2", root / name)
        for folder in complete(root / name / "checkpoints"):
            if int(folder.name[5:]) > FADING:
                shutil.rmtree(folder)
    shutil.copytree(root / "zero-1", root / "zero-1-on-3")
    for folder in complete(root / "zero-1-on-3" / "checkpoints")[4:]:
        shutil.rmtree(folder)
    runs = [spec("again-2", 2), spec("from-2-on-3", 3), spec("dry", 2, "--dry-run")]
    runs.append(spec("zero-1-on-3", 3, *short, *ZERO, "2", **fp32))
    (root / "said.txt").write_text(begin(python, root, runs))
    return root


def last(run: Path) -> Path:
    return complete(run / "checkpoints")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_grows_the_same_networks(grown, ranks):
    one, other = (complete(grown / name / "checkpoints") for name in ("g1", f"g{ranks}"))
    assert [path.name for path in other] == [path.name for path in one]
    assert one[-1].name == "nimg-000000420"
    assert 0 < furthest(other[-1], one[-1]) < 1e-7
    assert not torch.equal(load(one[0])[0]["D"]["b4.conv.weight"], load(one[-1])[0]["D"]["b4.conv.weight"])


@pytest.mark.slow
def test_two_ranks_go_on_exactly_in_the_midst_of_a_fade(grown, assert_same_run):
    assert f"Going on from {grown}/again-2/checkpoints/nimg-{FADING:09d}" in (grown / "said.txt").read_text()
    assert_same_run(
        grown / "again-2", grown / "g2", checkpoints=len(complete(grown / "g1" / "checkpoints")), snapshots=1
    )


@pytest.mark.slow
def test_a_dry_run_on_two_ranks(grown):
    said = (grown / "said.txt").read_text()
    for text in ("5 iterations of 24 images (12 on each process)", "At 4 px on cpu", "At 16 px on cpu"):
        assert text in said
    assert not (grown / "dry").exists()


@pytest.mark.slow
def test_a_fade_of_two_ranks_goes_on_with_three(grown):
    assert furthest(last(grown / "from-2-on-3"), last(grown / "g2")) < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overlap", "zero-1", "zero-2", "zero-1-on-3"])
def test_every_strategy_grows(grown, name):
    """With new engines (or buckets) at each stage, for what is at work; also gone on with on other ranks and stages."""
    alone, other = (complete(grown / run / "checkpoints") for run in ("alone", name))
    assert [path.name for path in other] == [path.name for path in alone]
    assert other[-1].name == "nimg-000000096"
    for a, b in zip(alone, other, strict=True):
        assert load(a)[0]["optimizer_G"].keys() == load(b)[0]["optimizer_G"].keys()
    assert furthest(other[-1], alone[-1]) < 1e-2
