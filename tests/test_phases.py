"""training/phases.py: one gradient, however a batch is split over passes and ranks; no step where it is not finite."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from styleloom.training import report
from styleloom.training.phases import own_rows
from styleloom.training.trainer import Training

PHASES = ("Gmain", "Gpl", "Dmain", "Dr1")


@pytest.fixture(scope="module")
def helper():
    """The module two_ranks.py, to do its work here alone."""
    spec = importlib.util.spec_from_file_location("two_ranks", Path(__file__).with_name("two_ranks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(found: dict, expected: dict, phase: str, tolerance: float = 1e-9, optimizer: bool = True) -> None:
    """Weights after a phase, w_avg and pl_mean; and gradients, moments and steps if `found` has the optimizer."""
    a, b = ({k: x for k, x in each.items() if k.startswith(f"{phase}/")} for each in (found, expected))
    names = [name for name in a if name.startswith((f"{phase}/G.", f"{phase}/D."))]
    if optimizer:
        assert a.keys() == b.keys()
        assert sum(name.endswith(":exp_avg") for name in names) > 10
        assert any(a[name].abs().max() > 1e-3 for name in names if name.endswith(":exp_avg"))
    assert a.keys() == {name for name in b if optimizer or ":" not in name}
    for name in [*names, f"{phase}/w_avg", f"{phase}/pl_mean"]:
        assert a[name].dtype == b[name].dtype
        if name.endswith(":step"):
            assert torch.equal(a[name], b[name])
        elif tolerance < 1e-6:
            torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=1e-11, msg=lambda t, n=name: f"{n}: {t}")
        else:
            assert (a[name] - b[name]).norm() <= tolerance * (b[name].norm() + 1e-3), name


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 13])
@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_each_row_belongs_to_one_pass_of_one_rank(batch, world, parts):
    rows = [own_rows(batch, rank, world, part, parts) for rank in range(world) for part in range(parts)]
    assert sorted(row for part in rows for row in part) == list(range(batch))


def test_a_rank_holds_whole_minibatch_std_groups():
    """Groups of 2 in a batch of 8 are the rows g, g + 4; in the pass of a rank with 2 rows they have to be the same."""
    for rank in range(2):
        for part in range(2):
            a, b = own_rows(8, rank, 2, part, 2)
            assert b - a == 4


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["unlabelled", "labelled"])
def test_two_passes_have_the_gradients_of_one(settings, helper, request, phase, kind):
    data = request.getfixturevalue(kind)
    more = ["--data.labels"] if kind == "labelled" else []
    one, two = (
        helper.phase_results(settings(data, "", "--batch=8", *more, f"--passes={passes}"), helper.Alone())
        for passes in (1, 2)
    )
    assert one[f"{phase}/rows"].tolist() == [4 if phase == "Gpl" else 8]
    assert two[f"{phase}/rows"].tolist() == ([2, 2] if phase == "Gpl" else [4, 4])
    compare(two, one, phase)


# kind: (images of a pass of a rank in Gpl, and in the others; tolerance). bf16 rounds each rank's part before the sum.
KINDS = {
    "gradients": ([1], [2], 1e-9),
    "labelled": ([1], [2], 1e-9),
    "ada": ([1], [2], 1e-9),
    "buckets": ([1], [2], 1e-9),
    "zero0": ([1], [2], 3e-4),
    "zero1": ([1], [2], 3e-4),
    "zero2": ([1], [2], 3e-4),
    "zero1-passes": ([1, 1], [2, 2], 3e-4),
    "zero1-bf16": ([1], [2], 3e-2),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_do_what_one_does(two_ranks, phase, rank, kind):
    """With either strategy. (With deepspeed in fp32, as it has the optimizer's state in fp32.)"""
    few, many, tolerance = KINDS[kind]
    two = load_file(two_ranks / f"{kind}-2-{rank}.safetensors")
    assert two[f"{phase}/rows"].tolist() == (few if phase == "Gpl" else many)
    compare(two, load_file(two_ranks / f"{kind}-1.safetensors"), phase, tolerance, has_optimizer(kind, rank))


def has_optimizer(kind: str, rank: int) -> bool:
    """A divided optimizer's whole state is for the main rank only."""
    return rank == 0 or kind[:5] not in ("zero1", "zero2")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("kind", "tolerance"), [("few", 1e-9), ("zero2-few", 3e-4)])
def test_a_phase_with_fewer_images_than_ranks(two_ranks, rank, kind, tolerance):
    two = load_file(two_ranks / f"{kind}-2-{rank}.safetensors")
    assert two["Gpl/rows"].tolist() == [1 - rank]
    for phase in PHASES:
        compare(two, load_file(two_ranks / f"{kind}-1.safetensors"), phase, tolerance, has_optimizer(kind, rank))


@pytest.mark.parametrize("kind", ["gradients", "buckets", "zero0", "zero1", "zero2"])
def test_what_a_phase_does_not_reach_is_left_alone(two_ranks, kind):
    """By Adam, with its moments and its count of steps; a zero gradient would change both."""
    results = load_file(two_ranks / f"{kind}-2-0.safetensors")
    for first, second, without in (("Gmain", "Gpl", "G.synthesis.b16.torgb.bias"), ("Dmain", "Dr1", "D.b4.out.bias")):
        for key in ("", ":exp_avg", ":exp_avg_sq", ":step"):
            assert torch.equal(results[f"{second}/{without}{key}"], results[f"{first}/{without}{key}"])
        assert results[f"{second}/{without}:step"] == 1
        reached = without.replace("torgb.bias", "torgb.weight").replace("out.bias", "out.weight")
        assert results[f"{second}/{reached}:step"] == 2


def test_the_means_move(two_ranks):
    results = load_file(two_ranks / "gradients-2-0.safetensors")
    assert results["Gmain/w_avg"].abs().max() > 0
    assert results["Gmain/pl_mean"] == pytest.approx(0.3, abs=0)
    assert abs(results["Gpl/pl_mean"] - 0.3) > 1e-4


# The gradient's norm

STEPS = {"Gmain": 1, "Gpl": 2, "Dmain": 1, "Dr1": 2}  # of what the phase reaches, after it


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "kind", ["gradients", "buckets", "zero0", "zero1", "zero2", "zero1-passes", "few", "zero2-few"]
)
def test_the_norm_is_that_of_the_global_gradient(two_ranks, phase, kind):
    """Which Adam's first moment is, as beta1 is 0."""
    alone = load_file(two_ranks / f"{kind}-1.safetensors")
    steps = {name.removesuffix(":step"): x for name, x in alone.items() if name.startswith(f"{phase}/")}
    moments = [name for name in alone if name.startswith(f"{phase}/") and name.endswith(":exp_avg")]
    reached = [name for name in moments if steps[name.removesuffix(":exp_avg")] == STEPS[phase]]
    expected = torch.stack([alone[name].double().norm() for name in reached]).norm().item()
    assert expected > 1e-3
    tolerance = 1e-5 if alone[reached[0]].dtype == torch.float64 else 1e-3
    for name in ("1", "2-0", "2-1"):
        count, total, _ = load_file(two_ranks / f"{kind}-{name}.safetensors")[f"{phase}/norm"]
        assert count == 1
        assert total == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", ["spoilt", "zero1-spoilt"])
def test_a_gradient_that_is_not_finite_has_no_norm(two_ranks, kind):
    results = load_file(two_ranks / f"{kind}-2-0.safetensors")
    assert results["Gpl/norm"][0] == 1
    assert results["Dmain/norm"][0] == results["Dr1/norm"][0] == 0


# Gradients that are not finite


@pytest.mark.parametrize("kind", ["spoilt", "zero1-spoilt"])
@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_that_are_not_finite_on_one_rank_stop_the_step_on_all(two_ranks, rank, kind):
    two, good = (load_file(two_ranks / f"{name}-2-{rank}.safetensors") for name in (kind, "gradients"))
    for phase in ("Gmain", "Gpl"):
        assert two[f"{phase}/stepped"]
        assert two[f"{phase}/changed"]
    for phase in ("Dmain", "Dr1"):
        assert not two[f"{phase}/stepped"]
        assert not two[f"{phase}/changed"]
        assert two[f"{phase}/bad"][1] > 100
        assert good[f"{phase}/stepped"]
        assert good[f"{phase}/changed"]
        assert good[f"{phase}/bad"][1] == 0


def test_training_stops_when_gradients_stay_not_finite(unlabelled, settings, helper, monkeypatch):
    training = Training(settings(unlabelled, ""), helper.Alone())
    training.begin()
    reals, classes = training.to_device(*next(training.stream()))
    (phase,) = (phase for phase in training.recipe.phases if phase.name == "Dmain")
    spoilt, patience = torch.full_like(reals, float("inf")), training.run.health.patience
    for _ in range(2):  # a good step in between begins the count anew
        for _ in range(patience - 1):
            training.run_phase(phase, spoilt, classes)
        training.run_phase(phase, reals, classes)
    counted = report.Report.state_dict()["nonfinite/Dmain"]
    assert counted[0] == 2 * patience
    assert counted[1] > 1000
    for _ in range(patience - 1):
        training.run_phase(phase, spoilt, classes)
    with pytest.raises(ValueError, match=r"phase Dmain were not finite 10 times in a row.*recipe\.lr"):
        training.run_phase(phase, spoilt, classes)
