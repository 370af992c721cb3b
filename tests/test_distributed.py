"""training/distributed.py: on two ranks over gloo (two_ranks.py) and alone."""

import json

import pytest
import torch

from styleloom.training.distributed import Replicated, Team, buckets, count_nonfinite, lost


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
    team.close()


def test_processes_that_were_launched_but_did_not_join_are_refused(monkeypatch):
    Team()  # Accelerate settles here that it is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched but only 1 joined.*ACCELERATE_USE_CPU=true"):
        Team()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/x/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:51083. This is typical"),
        torch.distributed.DistNetworkError("Connection closed by peer [::1]:51083"),
    ],
)
def test_a_broken_connection_is_told_in_two_lines(error):
    with pytest.raises(ConnectionError) as caught, lost("process 3 lost touch", "Do this"):
        raise error
    assert str(caught.value) == "process 3 lost touch: Connection closed by peer [::1]:51083.\nDo this."


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), lost("process 3 lost touch", "Do this"):
        raise RuntimeError("shapes do not match")


def test_buckets_keep_the_order_and_are_full():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 1, 10, 2, 2, 1)]
    assert [[p.numel() for p in bucket] for bucket in buckets(parameters, 16)] == [[3, 1], [10], [2, 2], [1]]
    assert buckets(parameters, 0) == [parameters]


def test_count_nonfinite_counts_elements():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert count_nonfinite([x, None], [torch.tensor([float("-inf"), 0.0])]) == 3
    assert count_nonfinite([None], []) == 0  # nothing to count
    assert count_nonfinite([torch.tensor([3e38, -3e38, 3e38])]) == 0  # finite, though their sum is not


def make_updater():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, betas=(0.0, 0.9))
    return network, Replicated(Team(), network, optimizer)


def step(network, updater, only_first=False):
    updater.clear()
    x = network[0](torch.ones(5, 3)) if only_first else network(torch.ones(5, 3))
    updater.add(x.square().sum(), last=True)
    assert updater.reduce([]) == 0
    updater.step()


def test_an_optimizer_goes_on_as_if_it_had_never_stopped():
    network, updater = make_updater()
    step(network, updater)
    step(network, updater, only_first=True)
    state = {name: x.clone() for name, x in updater.state().items()}
    assert sorted(state)[:3] == ["0.bias:exp_avg", "0.bias:exp_avg_sq", "0.bias:step"]
    assert (state["0.bias:step"], state["1.bias:step"]) == (2, 1)
    other, fresh = make_updater()
    step(other, fresh)  # leaves a state that has to go
    other.load_state_dict(network.state_dict())
    fresh.load(state)
    for _ in range(2):
        step(network, updater)
        step(other, fresh)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_that_never_stepped_has_no_state():
    network, updater = make_updater()
    assert updater.state() == {}
    step(network, updater)
    updater.load({})
    assert updater.state() == {}


def test_restored_optimizer_state_lies_where_its_parameter_does():
    """A fused optimizer on a GPU needs its step count there; `meta` stands in for the GPU."""
    network = torch.nn.Linear(2, 2, device="meta")
    updater = Replicated(Team(), network, torch.optim.Adam(network.parameters()))
    updater.load({"weight:step": torch.tensor(3.0), "weight:exp_avg": torch.zeros(2, 2)})
    assert {x.device.type for x in updater.optimizer.state[network.weight].values()} == {"meta"}


def test_the_norm_of_a_gradient():
    network, updater = make_updater()
    updater.clear()
    updater.add(network(torch.ones(5, 3)).square().sum(), last=True)
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    assert updater.reduce([torch.full([3], 1e9)]) == 0  # other sums are not part of it
    assert updater.norm.item() == pytest.approx(gradient.norm().item(), rel=1e-6)


def test_the_norm_of_a_gradient_whose_squares_are_too_large():
    network, updater = make_updater()
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e30)
    count = sum(p.numel() for p in network.parameters())
    assert updater.reduce([]) == 0
    assert updater.norm.item() == pytest.approx(1e30 * count**0.5, rel=1e-6)
    assert updater.norm.isfinite()


def test_sums_that_are_not_finite_are_counted_with_the_gradient():
    network, updater = make_updater()
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    assert updater.reduce([torch.tensor([1.0, float("nan")])]) == 1
    first = next(network.parameters())
    first.grad = torch.full_like(first, float("inf"))
    assert updater.reduce([torch.tensor([1.0, float("nan")])]) == 13


def test_a_phase_that_reaches_nothing_has_no_gradient():
    _, updater = make_updater()
    updater.clear()
    assert updater.reduce([]) == 0
    assert updater.norm == 0
