"""training/phases.py: one gradient, however a batch is split over passes and ranks; no step where it is not finite."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from styleloom.training import report, trainer
from styleloom.training.phases import count_nonfinite, own_rows, reduce_gradients
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


@pytest.fixture(autouse=True)
def _no_reports():
    yield
    report.Report.load_state_dict({})


def compare(found: dict, expected: dict, phase: str) -> None:
    """Gradients (and which of them are None), w_avg and pl_mean of a phase, to float64's tolerance."""
    a, b = ({k: x for k, x in each.items() if k.startswith(f"{phase}/")} for each in (found, expected))
    assert a.keys() == b.keys()
    gradients = [name for name in a if name.startswith((f"{phase}/G.", f"{phase}/D."))]
    assert len(gradients) > 10
    assert any(a[name].abs().max() > 1e-3 for name in gradients)
    for name in [*gradients, f"{phase}/w_avg", f"{phase}/pl_mean"]:
        assert a[name].dtype == torch.float64
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


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


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["gradients", "labelled"])
def test_two_ranks_have_the_gradients_of_one(two_ranks, phase, rank, kind):
    two = load_file(two_ranks / f"{kind}-2-{rank}.safetensors")
    assert two[f"{phase}/rows"].tolist() == [1 if phase == "Gpl" else 2]
    compare(two, load_file(two_ranks / f"{kind}-1.safetensors"), phase)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_phase_with_fewer_images_than_ranks(two_ranks, rank):
    two = load_file(two_ranks / f"few-2-{rank}.safetensors")
    assert two["Gpl/rows"].tolist() == [1 - rank]
    for phase in PHASES:
        compare(two, load_file(two_ranks / "few-1.safetensors"), phase)


def test_what_a_phase_does_not_reach_keeps_no_gradient(two_ranks):
    """Adam leaves a parameter without a gradient alone; a zero would move it by its momentum."""
    results = load_file(two_ranks / "gradients-2-0.safetensors")
    for phase, without in {"Gpl": "G.synthesis.b16.torgb.bias", "Dr1": "D.b4.out.bias"}.items():
        other = {"Gpl": "Gmain", "Dr1": "Dmain"}[phase]
        assert f"{phase}/{without}" not in results
        assert f"{other}/{without}" in results


def test_the_means_move(two_ranks):
    results = load_file(two_ranks / "gradients-2-0.safetensors")
    assert results["Gmain/w_avg"].abs().max() > 0
    assert results["Gmain/pl_mean"] == pytest.approx(0.3, abs=0)
    assert abs(results["Gpl/pl_mean"] - 0.3) > 1e-4


def test_reduce_gradients_tells_none_from_zero():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([1.0, 2.0]), torch.zeros(2)
    other = torch.tensor([5.0])
    reduce_gradients([a, b, c], [other], lambda flat: 2 * flat)
    assert a.grad.tolist() == [2, 4]
    assert b.grad.tolist() == [0, 0]
    assert c.grad is None
    assert other.tolist() == [10]


# Gradients that are not finite


def test_count_nonfinite_counts_elements_of_gradients_and_of_the_others():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    a.grad = torch.tensor([1.0, float("nan"), float("inf")])
    assert count_nonfinite([a, b], [torch.tensor([float("-inf"), 0.0])]) == 3
    assert count_nonfinite([b], []) == 0  # nothing to count
    a.grad = torch.tensor([3e38, -3e38, 3e38])  # finite, though their sum is not
    assert count_nonfinite([a, b], []) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_that_are_not_finite_on_one_rank_stop_the_step_on_all(two_ranks, rank):
    two, good = (load_file(two_ranks / f"{kind}-2-{rank}.safetensors") for kind in ("spoilt", "gradients"))
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
    reals, classes = training.to_device(*next(training.stream()))
    (phase,) = (phase for phase in training.recipe.phases if phase.name == "Dmain")
    spoilt = torch.full_like(reals, float("inf"))
    for _ in range(2):  # a good step in between begins the count anew
        for _ in range(trainer.PATIENCE - 1):
            training.run_phase(phase, spoilt, classes)
        training.run_phase(phase, reals, classes)
    counted = report.Report.state_dict()["nonfinite/Dmain"]
    assert counted[0] == 2 * trainer.PATIENCE
    assert counted[1] > 1000
    for _ in range(trainer.PATIENCE - 1):
        training.run_phase(phase, spoilt, classes)
    with pytest.raises(ValueError, match=r"phase Dmain were not finite 10 times in a row.*recipe\.lr"):
        training.run_phase(phase, spoilt, classes)
