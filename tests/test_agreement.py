"""training/agreement.py: what the processes compare; several processes are threads here."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from styleloom.training import agreement
from styleloom.training.agreement import PLACES, check_agreement, check_replicas, code_version, fingerprints
from styleloom.training.config import Run, flat

VERSIONS = {"styleloom": "0.1.0 (3f2a90c1d4)", "torch": "2.11.0", "python": "3.11"}


class Processes:
    """As many threads as there are hosts; each has its host's name."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts, self.gathered, self.here = hosts, [], threading.local()
        self.barrier = threading.Barrier(len(hosts), timeout=60)
        self.box: dict[int, list] = {}

    def gather(self, objects: list) -> list:
        self.box[self.here.rank] = objects
        self.barrier.wait()
        theirs = [x for rank in sorted(self.box) for x in self.box[rank]]
        if self.barrier.wait() == 0:
            self.gathered.append(theirs)
        return theirs

    def name(self) -> str:
        return self.hosts[self.here.rank]

    def complaints(self, check) -> list[str]:
        """What `check(rank, gather)` complains of, by rank; "" if of nothing."""

        def of(rank: int) -> str:
            self.here.rank = rank
            try:
                check(rank, self.gather)
            except ValueError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(len(self.hosts)) as pool:
            return list(pool.map(of, range(len(self.hosts))))


@pytest.fixture
def processes(monkeypatch):
    """(*hosts) -> processes on them."""

    def start(*hosts: str) -> Processes:
        its = Processes(list(hosts))
        monkeypatch.setattr(agreement.socket, "gethostname", its.name)
        return its

    return start


@pytest.fixture
def complaint(processes):
    """(hosts, settings by rank, versions by rank) -> the complaint, which has to be the same everywhere."""

    def complaint(hosts: str, settings: list[dict], versions: list[dict] | None = None) -> str:
        each = versions or [VERSIONS] * len(settings)
        said = processes(*hosts).complaints(
            lambda rank, gather: check_agreement(rank, gather, settings[rank], each[rank])
        )
        assert len(set(said)) == 1
        assert len(said[0].splitlines()) <= 2
        return said[0]

    return complaint


def test_processes_that_agree(complaint):
    assert complaint("aab", [{"batch": 8, "data.path": "x"}] * 3) == ""


def test_settings_that_differ_are_named_with_ranks_and_hosts(complaint):
    said = complaint("abbc", [{"batch": 8, "seed": 0}] + [{"batch": 16, "seed": 0}] * 3)
    assert said == (
        "the processes were started with different settings: batch is 8 on rank 0 (a), 16 on ranks 1-3 (b, c).\n"
        "Start all with the same command."
    )


def test_many_differences_are_summarised(complaint):
    fields = [{f"field{i}": i * rank for i in range(6)} | {"name": "x" * 500 * rank} for rank in range(6)]
    said = complaint("abcdef", fields)
    assert "field1 is 0 on rank 0 (a), 1 on rank 1 (b), 2 on rank 2 (c) and 3 more; field2 is" in said
    assert "field4" not in said
    assert " and 3 more.\nStart" in said
    assert len(said) < 500


def test_scattered_ranks_are_written_as_ranges(complaint):
    said = complaint("aaaabbbb", [{"batch": 8 if rank in (2, 6) else 16} for rank in range(8)])
    assert "batch is 16 on ranks 0-1, 3-5, 7 (a, b), 8 on ranks 2, 6 (a, b)." in said


def test_equal_numbers_of_other_kinds_and_missing_fields_differ(complaint):
    assert "x is 1 on rank 0 (a), true on rank 1 (b)" in complaint("ab", [{"x": 1}, {"x": True}])
    assert "x is 1 on rank 0 (a), missing on rank 1 (b)" in complaint("ab", [{"x": 1}, {}])


def test_places_may_differ_between_nodes(complaint):
    assert complaint("ab", [dict.fromkeys(PLACES, 1), dict.fromkeys(PLACES, 2)]) == ""
    assert set(flat(Run())) > PLACES


def test_code_that_differs_is_told_of_rather_than_settings(complaint):
    other = VERSIONS | {"styleloom": "0.1.0 (77e1b2a004)"}
    said = complaint("ab", [{"batch": 8}, {"batch": 16}], [VERSIONS, other])
    assert said.startswith(
        "the processes run different code: styleloom is 0.1.0 (3f2a90c1d4) on rank 0 (a), 0.1.0 (77e1b2a004) on rank 1 "
        "(b).\nInstall the same versions on all nodes"
    )


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of styleloom's own folders, whose version `code_version` gives."""
    root = Path(agreement.__file__).parents[1]
    for folder in ("training", "ops", "datasets", "scripts"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "training" / "agreement.py"))
    return tmp_path


def version() -> str:
    code_version.cache_clear()
    return code_version()


def test_a_copy_of_the_code_has_the_same_version(sources, monkeypatch):
    (sources / "training" / "__pycache__").mkdir()
    (sources / "training" / "__pycache__" / "loop.cpython-311.pyc").write_bytes(b"x")
    (sources / "ops" / "csrc" / ".arith.h.swp").write_bytes(b"x")
    copied = version()
    monkeypatch.undo()
    assert version() == copied


@pytest.mark.parametrize("file", ["training/networks/layers.py", "ops/csrc/arith.h", "scripts/train.py"])
def test_a_change_to_any_source_changes_the_version(sources, file):
    before = version()
    with open(sources / file, "a") as its:
        its.write("\n")
    assert version() != before


def test_a_source_that_moves_changes_the_version(sources):
    before = version()
    (sources / "ops" / "csrc" / "arith.h").rename(sources / "ops" / "csrc" / "arithmetic.h")
    assert version() != before


def one(x: torch.Tensor) -> int:
    return int(fingerprints({"x": x})[0])


DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
]  # fmt: skip
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_it(dtype):
    x = (torch.randn(7, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    bits = x.view(INTS[dtype.itemsize])
    before = one(x)
    for i in range(len(x)):
        for bit in range(8 * dtype.itemsize):
            flipped = bits.clone()
            flipped[i] ^= torch.ones((), dtype=torch.int64).bitwise_left_shift(bit).to(flipped.dtype)
            assert one(flipped.view(dtype)) != before


def test_what_a_flipped_bit_is_multiplied_by_is_odd():
    # What makes the test above hold for all tensors, and not only for most.
    assert (agreement._multipliers(torch.device("cpu")) % 2 != 0).all()
    assert all(agreement._odd(part) % 2 for part in range(1000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_that_change_places_change_it(dtype):
    x = torch.arange(-50, 50).to(dtype)
    for i, j in [(0, 1), (0, 99), (0, 64), (49, 51), (17, 81)]:  # (49, 51) are -1 and 1
        swapped = x.clone()
        swapped[[i, j]] = x[[j, i]]
        assert one(swapped) != one(x)


def test_bits_count_and_not_values():
    assert one(torch.tensor([0.0])) != one(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert one(nans[:1]) != one(nans[1:])
    assert one(nans[:1]) == one(nans[:1].clone())


def test_positions_in_long_tensors_count():
    x = torch.zeros(3 * agreement._CHUNK + 5, dtype=torch.uint8)
    found = set()
    for i in (0, 1, agreement._CHUNK, agreement._CHUNK + 1, 2 * agreement._CHUNK, len(x) - 1):
        x[i] = 1
        found.add(one(x))
        x[i] = 0
    assert len(found) == 6


def test_the_layout_does_not_count():
    x = torch.randn(4, 3, 5, 6)
    assert one(x.to(memory_format=torch.channels_last)) == one(x)
    assert one(x.expand(2, 4, 3, 5, 6)[1]) == one(x)
    assert one(x.transpose(0, 1)) == one(x.transpose(0, 1).contiguous()) != one(x)


def test_every_tensor_has_its_own_and_odd_ones_are_taken():
    tensors = {
        "scalar": torch.tensor(2.5, requires_grad=True),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False, True]),
        "half": torch.ones(5, dtype=torch.float16),
    }
    found = fingerprints(tensors)
    assert (found.dtype, found.shape, found.requires_grad) == (torch.int64, (4,), False)
    for name, its in zip(tensors, found, strict=True):
        assert one(tensors[name]) == int(its)
    assert one(torch.tensor([True, True, False])) != int(found[2])
    assert fingerprints({}).shape == (0,)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"G.{i}.weight": torch.randn(4, 3, generator=generator) for i in range(5)}


def test_replicas_that_agree_gather_little(processes):
    its = processes("a", "a", "b")
    assert its.complaints(lambda rank, gather: check_replicas(rank, gather, weights(), 0)) == [""] * 3
    assert [len(x) for each in its.gathered for x in each] == [64] * 3


def damaged(wrong: dict[int, list[int]]):
    """The check, with one element of some tensors altered on some ranks: {rank: [tensor, ...]}"""

    def check(rank, gather) -> None:
        its = weights()
        for i in wrong.get(rank, []):
            its[f"G.{i}.weight"][1, 2] += rank
        check_replicas(rank, gather, its, 12300)

    return check


def test_a_replica_that_differs_from_the_majority_is_named(processes):
    said = processes("a", "a", "b", "b").complaints(damaged({2: [3]}))
    assert len(set(said)) == 1
    assert "not the same on all 4 processes any more, at 12.3 kimg; altered: G.3.weight on rank 2 (b).\n" in said[0]
    assert "the same command goes on from the last checkpoint" in said[0]
    assert len(said[0].splitlines()) == 2


def test_of_two_replicas_the_second_is_named(processes):
    assert "altered: G.0.weight on rank 1 (b).\n" in processes("a", "b").complaints(damaged({1: [0]}))[0]


def test_the_first_may_be_the_odd_one(processes):
    check = damaged({1: [0], 2: [0]})
    said = processes("a", "b", "c").complaints(lambda rank, gather: check(2 if rank else 0, gather))
    assert "G.0.weight on rank 0 (" in said[0]


def test_many_tensors_that_differ_are_summarised(processes):
    said = processes("a", "b", "b").complaints(damaged({1: [0, 1, 2, 3, 4]}))
    assert "G.2.weight on rank 1 (b) and 2 more.\n" in said[0]


def test_replicas_of_other_shapes_differ(processes):
    shapes = [(4, 3), (4, 3), (3, 4)]
    said = processes("a", "b", "c").complaints(
        lambda rank, gather: check_replicas(rank, gather, {"x": torch.zeros(shapes[rank])}, 0)
    )
    assert "x on rank 2 (c)" in said[0]
