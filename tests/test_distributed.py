"""training/distributed.py: on two ranks over gloo (two_ranks.py) and alone."""

import json

import pytest
import torch

from styleloom.training.distributed import Team


@pytest.fixture(params=[0, 1])
def rank(request):
    return request.param


@pytest.fixture
def sums(two_ranks, rank):
    return json.loads((two_ranks / f"sums-{rank}.json").read_text())


def test_the_ranks_found_one_another(sums, rank):
    assert sums["world"] == [2, 2, rank == 0]


def test_sums_over_ranks(sums):
    assert sums["sum"] == [3.0, 1.0]


def test_named_sums_count_what_a_rank_lacks_as_zero(sums):
    assert sums["named"] == {"both": [3.0, 6.0], "only 0": [[7.0, 7.0]] * 2, "only 1": [[7.0, 7.0]] * 2}
    assert sums["nothing"] == {}


def test_any_is_the_same_on_all_ranks(sums):
    assert sums["totals"] == [1, 5, 0]


def test_objects_are_gathered_in_the_order_of_the_ranks(sums):
    assert sums["gathered"] == ["of 0", "of 1"]


def test_a_team_of_one():
    team = Team()
    assert (team.rank, team.world, team.main) == (0, 1, True)
    assert team.totals(True, 2.5, 0) == [1, 2.5, 0]
    x = torch.ones(3)
    assert team.sum_(x) is x
    assert team.sum_named({"x": x})["x"] is x
    assert team.gather(["a"]) == ["a"]
    team.wait()
    team.close()


def test_processes_that_were_launched_but_did_not_join_are_refused(monkeypatch):
    Team()  # Accelerate settles here that it is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched but only 1 joined.*ACCELERATE_USE_CPU=true"):
        Team()
