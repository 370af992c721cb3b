"""training/metrics/evaluation.py: on any number of processes (here threads, whose team exchanges by a barrier) the
features are the same; what was killed, stopped or spoilt goes on where it was."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from styleloom.training.metrics import evaluation as module
from styleloom.training.metrics.distances import frechet, inception_score, kid, moments, precision_recall
from styleloom.training.metrics.evaluation import Evaluation, check_metrics
from styleloom.training.metrics.features import resize
from styleloom.training.metrics.ppl import mean_length
from styleloom.training.watchdog import Place

CHUNK, COUNT = 16, 38  # images: chunks of 16, 16 and 6


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", CHUNK)
        yield


class Network:
    """A feature network that counts what it is given: 6 numbers of an image, and the size of its batch, which would
    show if batches were cut differently."""

    fingerprint, name, file = "network-1", "stand-in", "network.pt"
    head = torch.eye(4, 7)

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        means = images.mean(dim=[2, 3])
        return torch.cat([means, images.std(dim=[2, 3]), torch.full([len(images), 1], float(len(images)))], dim=1)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        return torch.from_numpy(features.astype(np.float64) / 50 @ self.head.double().T.numpy()).softmax(dim=1).numpy()


class Perceptual:
    fingerprint, name = "perceptual-1", "stand-in"

    def __init__(self) -> None:
        self.seen = 0

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        self.seen += len(a)
        return (a - b).double().square().flatten(1).sum(dim=1)


class Team:
    """A rank of several in the threads of this process."""

    device, local_world = torch.device("cpu"), 1

    def __init__(self, rank: int, world: int, board: dict, barrier: threading.Barrier) -> None:
        self.rank, self.world, self.main, self.place = rank, world, rank == 0, Place()
        self.board, self.barrier = board, barrier

    def gather(self, objects: list[Any]) -> list[Any]:
        self.board[self.rank] = objects
        self.barrier.wait(30)
        out = [each for rank in range(self.world) for each in self.board[rank]]
        self.barrier.wait(30)
        return out


def images_of(seed: int = 0) -> Callable[[range], list[Tensor]]:
    def images(positions: range) -> list[Tensor]:
        generators = [torch.Generator().manual_seed(seed * 1000 + p) for p in positions]
        return [torch.randint(0, 256, (3, 8, 8), generator=g, dtype=torch.uint8) for g in generators]

    return images


def on(
    world: int, act: Callable[[Evaluation], Any], caches: list[Path], **options: Any
) -> tuple[list[Any], list[Network]]:
    """(what `act` returned, or the exception that it raised, on each of the ranks; their networks)."""
    board, barrier = {}, threading.Barrier(world)
    networks, out = [Network() for _ in range(world)], [None] * world

    def work(rank: int) -> None:
        evaluation = Evaluation(
            Team(rank, world, board, barrier), networks[rank], Perceptual(), caches[rank % len(caches)],  # type: ignore
            "legacy", progress=False, **{name: value[rank] for name, value in options.items()},
        )  # fmt: skip
        try:
            out[rank] = act(evaluation)
        except Exception as error:
            out[rank] = error  # type: ignore[assignment]
            if not isinstance(error, ValueError):
                barrier.abort()

    threads = [threading.Thread(target=work, args=[rank]) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out, networks


def reals(evaluation: Evaluation) -> Any:
    return evaluation.reals("set", COUNT, images_of())


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> np.ndarray:
    (features,), (network,) = on(1, reals, [tmp_path_factory.mktemp("one")])
    assert network.seen == COUNT
    assert features.rows.shape == (COUNT, 7)
    assert features.rows[:, 6].tolist() == [16.0] * 32 + [6.0] * 6
    own = Network()(resize(images_of()(range(16)), "legacy")).numpy()
    assert np.array_equal(features.rows[:16], own)
    return features.rows


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_has_the_same_features(world, expected, tmp_path):
    found, networks = on(world, reals, [tmp_path])
    assert np.array_equal(found[0].rows, expected)
    assert all(each.rows.size == 0 and each.count == COUNT for each in found[1:])
    assert [network.seen for network in networks] == {2: [22, 16], 3: [16, 16, 6], 5: [16, 16, 6, 0, 0]}[world]


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_is_kept_without_an_identity(world, expected, tmp_path):
    for _ in range(2):
        found, networks = on(world, lambda e: e.fakes(None, COUNT, images_of()), [tmp_path / "new"])
        assert np.array_equal(found[0].rows, expected)
        assert sum(network.seen for network in networks) == COUNT
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("world", [1, 3])
def test_features_in_the_cache_are_used(world, expected, tmp_path):
    on(1, reals, [tmp_path])
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    found, networks = on(world, reals, [tmp_path])
    assert np.array_equal(found[0].rows, expected)
    assert sum(network.seen for network in networks) == 0


def test_other_sets_networks_and_resizing_are_not_mistaken_for_one_another(tmp_path):
    def act(evaluation: Evaluation) -> None:
        network = evaluation.network
        assert isinstance(network, Network)
        for change in (
            lambda: evaluation.reals("set", COUNT, images_of()),
            lambda: evaluation.reals("set 2", COUNT, images_of()),
            lambda: evaluation.reals("set", 30, images_of()),
            lambda: evaluation.fakes("set", COUNT, images_of()),
        ):
            before = network.seen
            assert change() is not None
            assert network.seen > before
        evaluation.resize, before = "clean", network.seen
        evaluation.reals("set", 3, images_of())
        assert network.seen == before + 3
        network.fingerprint = "network-2"
        evaluation.reals("set", 3, images_of())
        assert network.seen == before + 6

    assert on(1, act, [tmp_path])[0] == [None]


class KilledError(Exception):
    pass


def killed_after(chunks: int) -> Callable[[range], list[Tensor]]:
    calls = []

    def images(positions: range) -> list[Tensor]:
        calls.append(positions)
        if len(calls) > chunks:
            raise KilledError
        return images_of()(positions)

    return images


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_killed_evaluation_goes_on(world, expected, tmp_path):
    (died,), _ = on(1, lambda e: e.reals("set", COUNT, killed_after(2)), [tmp_path])
    assert isinstance(died, KilledError)
    found, networks = on(world, reals, [tmp_path])
    assert np.array_equal(found[0].rows, expected)
    assert sum(network.seen for network in networks) == 6  # the last chunk
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_each_node_may_have_its_own_cache(expected, tmp_path):
    """Two nodes, each of which had finished a chunk that the other has not."""
    nodes = [tmp_path / "a", tmp_path / "b"]
    on(2, lambda e: e.reals("set", COUNT, killed_after(1)), nodes)
    assert [len(list(node.rglob("00000*.npy"))) for node in nodes] == [1, 1]
    found, networks = on(2, reals, nodes)
    assert np.array_equal(found[0].rows, expected)
    assert [network.seen for network in networks] == [6, 0]
    assert [len(list(node.rglob("*.npy"))) for node in nodes] == [1, 0]


def test_a_spoilt_chunk_is_made_again(expected, tmp_path):
    on(1, lambda e: e.reals("set", COUNT, killed_after(2)), [tmp_path])
    first, second = sorted(tmp_path.rglob("00000*.npy"))
    first.write_bytes(first.read_bytes()[:300])
    (found,), (network,) = on(1, reals, [tmp_path])
    assert np.array_equal(found.rows, expected)
    assert network.seen == 16 + 6
    assert not second.exists()


def test_a_spoilt_whole_is_made_again(expected, tmp_path):
    on(1, reals, [tmp_path])
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    for seen in (COUNT, 0):
        (found,), (network,) = on(1, reals, [tmp_path])
        assert np.array_equal(found.rows, expected)
        assert network.seen == seen


@pytest.mark.parametrize("who", [0, 1])
def test_all_give_up_when_one_is_told_to_stop(who, expected, tmp_path):
    """Between chunks: each makes one, then rank `who` is stopped; what they made is kept."""
    asked = [0, 0]

    def stopped(rank: int) -> Callable[[], bool]:
        def ask() -> bool:
            asked[rank] += 1
            return rank == who and asked[rank] > 1

        return ask

    found, networks = on(2, reals, [tmp_path], stopped=[stopped(0), stopped(1)])
    assert found == [None, None]
    made = sum(network.seen for network in networks)
    assert made == {0: 32, 1: 38}[who]
    found, networks = on(2, reals, [tmp_path])
    assert np.array_equal(found[0].rows, expected)
    assert sum(network.seen for network in networks) == COUNT - made


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    def images(positions: range) -> list[Tensor]:
        if 20 in positions:
            raise ValueError("image 20 is spoilt")
        return images_of()(positions)

    found, _ = on(3, lambda e: e.reals("set", COUNT, images), [tmp_path])
    assert [str(each) for each in found] == ["image 20 is spoilt"] * 3
    assert all(type(each) is ValueError for each in found)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    found, _ = on(2, reals, [tmp_path / "file"])
    assert all(isinstance(each, ValueError) and str(tmp_path / "file") in str(each) for each in found)


def test_ranks_that_see_different_sets_are_told(tmp_path):
    found, _ = on(2, lambda e: e.reals("set", COUNT + e.team.rank, images_of()), [tmp_path])
    assert all("different sets of images, of 38 to 39" in str(each) for each in found)


@pytest.mark.parametrize("world", [1, 2])
def test_path_lengths(world, tmp_path):
    def pairs(positions: range) -> tuple[Tensor, Tensor]:
        at = torch.tensor([float(p) for p in positions])[:, None, None, None]
        return at.expand(-1, 1, 2, 2), torch.zeros(len(positions), 1, 2, 2)

    def act(evaluation: Evaluation) -> Any:
        perceptual = evaluation.perceptual
        assert isinstance(perceptual, Perceptual)
        first = evaluation.lengths("steps", COUNT, pairs)
        seen = perceptual.seen
        evaluation.lengths("steps", COUNT, pairs)
        assert perceptual.seen == seen
        return first and evaluation.team.main and (first, evaluation.measure(["ppl"], None, None, first))

    (lengths, values), *_ = on(world, act, [tmp_path])[0]
    assert lengths.rows[:, 0].tolist() == [4.0 * p * p for p in range(COUNT)]
    assert values == {"ppl": mean_length(lengths.rows[:, 0])}


def test_measures(tmp_path):
    def act(evaluation: Evaluation) -> Any:
        evaluation.network.head = None  # type: ignore[union-attr]
        a = evaluation.reals("set", 30, images_of())
        b = evaluation.fakes("fakes", 35, images_of(1))
        assert a is not None
        assert b is not None
        return a.rows, b.rows, evaluation.measure(["fid", "kid", "pr"], a, b, seed=3)

    (a, b, values), *_ = on(1, act, [tmp_path])[0]
    precision, recall = precision_recall(a, b)
    assert values == {
        "fid": frechet(*moments(a), *moments(b)), "kid": kid(a, b, 3), "precision": precision, "recall": recall,
    }  # fmt: skip


def test_inception_score_is_of_the_fakes_alone(tmp_path):
    class Headed(Network):
        head = torch.eye(4, 7)

    def act(evaluation: Evaluation) -> Any:
        evaluation.network = Headed()  # type: ignore[assignment]
        b = evaluation.fakes(None, 30, images_of(1))
        assert b is not None
        return b.rows, evaluation.measure(["is"], None, b)

    (rows, values), *_ = on(1, act, [tmp_path])[0]
    mean, std = inception_score(Headed().probabilities(rows))
    assert values == {"is": mean, "is_std": std}
    assert mean > 1.0001


def test_what_cannot_be_measured_is_told_before():
    network = Network()
    check_metrics(["fid", "kid", "is", "pr", "ppl"], network, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no metric 'fit'. There are: fid, kid, is, pr, ppl"):
        check_metrics(["fid", "fit"], network, 10)  # type: ignore[arg-type]
    for name, least in (("fid", 2), ("kid", 2), ("is", 10), ("pr", 4), ("ppl", 1)):
        with pytest.raises(ValueError, match=f"{name} needs at least {least} images, not {least - 1}"):
            check_metrics([name], network, least - 1)  # type: ignore[arg-type]
    network.head = None  # type: ignore[assignment]
    check_metrics(["fid"], network, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'is' needs a classifier, and stand-in has features only"):
        check_metrics(["fid", "is"], network, 10)  # type: ignore[arg-type]
