"""datasets/parts.py: a data set made in parts, in any order, at once, killed and again, is byte for byte the same.

With several sizes, labels, duplicates and unreadable pictures in it.
"""

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from styleloom.datasets import shards
from styleloom.datasets.manifest import FILE, WORK, atomic_file, locked, read_manifest
from styleloom.datasets.parts import WHOLE, Part, clear, desk, holding, parse_part, sweep
from styleloom.datasets.shards import OthersMissing, prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.verify import verify

SHARDS = 7
posix = pytest.mark.skipif(os.name != "posix", reason="needs flock")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """21 pictures in two folders; two are unreadable, two are duplicates."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(21):
        path = root / ("cat" if i < 9 else "dog") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 26, 3), np.uint8)).save(path)
    for i in (7, 15):
        (root / ("cat" if i < 9 else "dog") / f"{i:03d}.png").write_bytes(b"broken %d" % i)
    for i in (5, 18):
        shutil.copy(root / "cat" / "001.png", root / ("cat" if i < 9 else "dog") / f"{i:03d}.png")
    return root


def make(pictures, dest, part=WHOLE, **options):
    options = {"width": 12, "height": 8, "reduced": [(6, 4), (3, 2)], "shard_images": 3, "progress": False, **options}
    return prepare(open_source(pictures, "folders"), dest, part=part, **options)


def tree(folder) -> dict[str, str]:
    """sha256 of every file, of lock files too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A data set made in one go by one process."""
    dest = tmp_path_factory.mktemp("whole") / "data"
    make(pictures, dest)
    assert len(read_manifest(dest).shards) == SHARDS
    return dest


@pytest.mark.parametrize("order", [[1], [1, 2], [2, 1], [3, 1, 2], [4, 2, 3, 1], list(range(9, 0, -1))])
def test_parts_in_any_order_make_the_same(pictures, whole, tmp_path, order):
    dest, n = tmp_path / "data", len(order)
    for done, number in enumerate(order[:-1], 1):
        with pytest.raises(OthersMissing) as caught:
            make(pictures, dest, Part(number, n))
        others = [k for k in order[done:] if k <= SHARDS]
        assert (caught.value.parts, caught.value.shards) == (sorted(others), SHARDS)
        with pytest.raises(ValueError, match="half-written"):
            read_manifest(dest)
        if not others:
            break
    outcome = make(pictures, dest, Part(order[-1], n))
    assert outcome.manifest == read_manifest(whole)
    assert tree(dest) == tree(whole)


def test_a_part_makes_its_own_shards_only(pictures, tmp_path):
    with pytest.raises(OthersMissing) as caught:
        make(pictures, tmp_path / "data", Part(2, 3))
    assert {path.stem for path in (tmp_path / "data").rglob("*.tar")} == {"shard-000001", "shard-000004"}
    assert caught.value.missing == [0, 2, 3, 5, 6]
    assert caught.value.parts == [1, 3]
    with pytest.raises(OthersMissing, match=r"part 2/3 is made; 5 of 7 shards are still missing"):
        make(pictures, tmp_path / "data", Part(2, 3))


def test_a_part_of_a_finished_data_set_has_nothing_to_do(pictures, whole, tmp_path):
    dest = shutil.copytree(whole, tmp_path / "data")
    assert make(pictures, dest, Part(2, 5)).already
    assert tree(dest) == tree(whole)


def test_a_whole_run_goes_on_where_parts_were_and_parts_where_it_was(pictures, whole, tmp_path, monkeypatch):
    made = []
    make_shard = shards.make_shard
    monkeypatch.setattr(shards, "make_shard", lambda task, tick: (made.append(task.number), make_shard(task, tick)))
    dest = tmp_path / "data"
    for part in (Part(1, 3), Part(2, 2)):
        with pytest.raises(OthersMissing):
            make(pictures, dest, part)
    make(pictures, dest)
    assert sorted(made) == list(range(SHARDS))  # none twice
    assert tree(dest) == tree(whole)


def test_duplicates_are_searched_by_one_part_only(pictures, tmp_path, monkeypatch):
    with pytest.raises(OthersMissing):
        make(pictures, tmp_path / "data", Part(1, 2))
    monkeypatch.setattr("styleloom.datasets.duplicates._search", lambda *args: 1 / 0)
    make(pictures, tmp_path / "data", Part(2, 2))


def test_a_shard_of_another_part_that_went_bad_is_missed(pictures, whole, tmp_path):
    dest = tmp_path / "data"
    with pytest.raises(OthersMissing):
        make(pictures, dest, Part(1, 2))
    (dest / "6x4" / "shard-000002.tar").write_bytes(b"")
    with pytest.raises(OthersMissing) as caught:
        make(pictures, dest, Part(2, 2))
    assert caught.value.missing == [2]
    make(pictures, dest, Part(1, 2))
    assert tree(dest) == tree(whole)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1 / 2"])
def test_what_is_no_part(text):
    with pytest.raises(ValueError, match="--part is I/N with I from 1 to N, such as 2/8"):
        parse_part(text)


def test_parts():
    assert parse_part("2/8") == Part(2, 8)
    parts = [Part(i, 3) for i in (1, 2, 3)]
    assert [[part.has(shard) for part in parts].index(True) for shard in range(5)] == [0, 1, 2, 0, 1]
    assert all(WHOLE.has(shard) for shard in range(5))


# Locks


@posix
@pytest.mark.parametrize(
    ("held", "wanted", "message"),
    [
        (WHOLE, WHOLE, "another styleloom prepare is writing .*data: let it end first"),
        (WHOLE, Part(1, 2), "another styleloom prepare is writing .*data: let it end first"),
        (Part(2, 2), WHOLE, "another styleloom prepare is writing .*data: let it end first"),
        (Part(1, 2), Part(1, 2), "another styleloom prepare is writing .*data as --part 1/2: let it end first"),
        (Part(2, 3), Part(1, 2), "another styleloom prepare is writing .*data as --part 2/3: use one number of parts"),
    ],
)
def test_what_would_make_the_same_shards_is_refused(pictures, tmp_path, held, wanted, message):
    dest = tmp_path / "data"
    with desk(dest), holding(dest, held), pytest.raises(ValueError, match=message), holding(dest, wanted):
        pass
    with desk(dest), holding(dest, wanted):  # it is free again
        pass


@posix
def test_one_at_a_time_is_at_the_desk(tmp_path):
    with desk(tmp_path), pytest.raises(ValueError, match="held"), locked(tmp_path / WORK / "desk.lock", "held"):
        pass


@posix
def test_the_last_part_to_end_clears_up(pictures, whole, tmp_path):
    """The manifest may be written while another part is still there: its lock and temporary files stay."""
    dest = tmp_path / "data"
    with pytest.raises(OthersMissing):
        make(pictures, dest, Part(1, 2))
    with desk(dest):
        other = holding(dest, Part(1, 2))
        other.__enter__()
    (dest / "shard-000000.tar.123.tmp").write_bytes(b"its")
    make(pictures, dest, Part(2, 2))
    assert (dest / FILE).exists()
    assert (dest / WORK).exists()
    assert (dest / "shard-000000.tar.123.tmp").exists()
    other.__exit__(None, None, None)
    assert make(pictures, dest, Part(1, 2)).already
    assert tree(dest) == tree(whole)


def test_a_part_sweeps_up_after_itself_only(tmp_path):
    folders = [tmp_path, tmp_path / "6x4"]
    for folder in (*folders, tmp_path / WORK):
        folder.mkdir(exist_ok=True)
        for shard in (0, 1, 2):
            (folder / f"shard-{shard:06d}.tar.abc.tmp").touch()
            (folder / f"{shard:06d}.json.abc.tmp").touch()
        (folder / "manifest.json.abc.tmp").touch()
    sweep(tmp_path, folders, Part(2, 2))
    left = {path.name for path in tmp_path.rglob("*.tmp")}
    assert left == {
        "shard-000000.tar.abc.tmp", "shard-000002.tar.abc.tmp", "000000.json.abc.tmp", "000002.json.abc.tmp",
        "manifest.json.abc.tmp",
    }  # fmt: skip
    clear(tmp_path, folders)
    assert [path.name for path in tmp_path.rglob("*")] == ["6x4"]


def test_two_that_write_one_file_at_once_do_not_meet(tmp_path):
    """Process ids are no help: on two machines they may be the same."""
    path = tmp_path / "file"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write(b"first")
        second.write(b"second, and longer")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# At once, and killed


def start(pictures, dest, part: Part, *more: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "styleloom.scripts.prepare", str(pictures), str(dest), "--labels", "folders",
        "--resolution", "12x8", "6x4", "3x2", "--shard-images", "3", "--workers", "1", "--part", str(part), *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def test_parts_at_once_make_the_same(pictures, whole, tmp_path):
    dest = tmp_path / "data"
    said = [finish(process) for process in [start(pictures, dest, Part(i, 3)) for i in (1, 2, 3)]]
    assert tree(dest) == tree(whole)
    assert sum(f"{dest} is " in text for text in said) >= 1
    for text in said:
        assert f"{dest} is " in text or " of 7 shards " in text


@pytest.mark.slow
def test_many_parts_at_once_again_and_again(pictures, whole, tmp_path):
    for turn in range(5):
        dest = tmp_path / f"data-{turn}"
        for process in [start(pictures, dest, Part(i, 7)) for i in range(1, 8)]:
            finish(process)
        assert tree(dest) == tree(whole)


@pytest.mark.slow
def test_killed_parts_are_run_again_while_others_work(pictures, whole, tmp_path):
    """A part that is stopped within a shard loses that shard; the other one does not notice."""
    dest, stopper = tmp_path / "data", tmp_path / "stopper.py"
    stopper.write_text(
        "import os, signal, sys\n"
        "from styleloom.datasets import writer\n"
        "from styleloom.scripts import cli, prepare\n"
        "write = writer._Hashing.write\n"
        "def slow(self, data):\n"
        "    write(self, data)\n"
        "    self.file.flush()\n"
        "    if self.size > 6000 and 'shard-000002' in self.file.name:\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return len(data)\n"
        "writer._Hashing.write = slow\n"
        "cli.run(prepare.main, 'prepare', sys.argv[1:])\n"
    )
    stopped = start(pictures, dest, Part(1, 2))
    stopped.kill()
    stopped.communicate()
    command = [sys.executable, str(stopper), *map(str, stopped.args[3:])]  # pyright: ignore
    stopped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 30
    while not list(dest.glob("shard-000002.tar.*.tmp")):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "missing" in finish(start(pictures, dest, Part(2, 2)))
    assert len(list(dest.glob("shard-000002.tar.*.tmp"))) == 1  # not swept: its part has it
    refused = start(pictures, dest, Part(1, 2)).communicate(timeout=60)[1]
    assert "as --part 1/2: let it end first" in refused
    stopped.send_signal(signal.SIGKILL)
    stopped.communicate()
    assert len(list(dest.glob("shard-000002.tar.*.tmp"))) == 1
    assert "is ready" in finish(start(pictures, dest, Part(1, 2)))
    assert tree(dest) == tree(whole)


# Sizes


def test_all_sizes_are_data_sets_with_the_same_samples(pictures, whole):
    manifest = read_manifest(whole)
    assert manifest.reduced == ["6x4", "3x2"]
    sets = [(whole, manifest), *((whole / name, read_manifest(whole / name)) for name in manifest.reduced)]
    assert [(its.width, its.height) for _, its in sets] == [(12, 8), (6, 4), (3, 2)]
    assert [its.reduced for _, its in sets[1:]] == [[], []]
    assert manifest.count == 17
    listings = []
    for folder, its in sets:
        assert verify(folder, progress=False) == []
        listings.append([(shard.name, shard.count) for shard in its.shards])
        assert its.statistics == manifest.statistics
        assert its.class_counts == manifest.class_counts == [7, 10]
        assert len({its.hash for _, its in sets}) == 3
        source = open_source(folder / "shard-000000.tar")
        assert [entry.name for entry in source.entries] == [f"shard-000000.tar/{i:08d}.png" for i in range(3)]
    assert listings[0] == listings[1] == listings[2]


def test_a_set_of_several_sizes_is_a_source_of_the_largest(whole, tmp_path):
    source = open_source(whole)
    assert len(source) == 17
    again = prepare(source, tmp_path / "data", width=6, height=4, shard_images=100, progress=False).manifest
    assert (again.count, again.class_counts) == (17, [7, 10])
    assert again.statistics is not None
    assert (again.statistics.width.least, again.statistics.width.most) == (12, 12)


def test_each_size_is_what_it_would_be_alone(pictures, whole, tmp_path):
    for width, height in ((12, 8), (6, 4), (3, 2)):
        alone = tmp_path / f"{width}"
        make(pictures, alone, width=width, height=height, reduced=())
        folder = whole if width == 12 else whole / f"{width}x{height}"
        for path in alone.glob("shard-*"):
            assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize(
    ("reduced", "message"),
    [
        ([(6, 6)], "12x8 and 6x6 differ in their aspect"),
        ([(24, 16)], "24x16 is not smaller than 12x8"),
        ([(12, 8)], "12x8 is not smaller than 12x8"),
        ([(6, 4), (0, 0)], "resolution 0x0 is not within"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(pictures, tmp_path, reduced, message):
    with pytest.raises(ValueError, match=message):
        make(pictures, tmp_path / "data", reduced=reduced)
    assert not (tmp_path / "data").exists()


def test_a_set_of_other_sizes_is_another_one(pictures, whole):
    with pytest.raises(ValueError, match="the smaller sizes are 6x4, 3x2 there, 6x4 here"):
        make(pictures, whole, reduced=[(6, 4)])


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("call", [1, 2, 3, 4, 7, 12, 14, 17, 18, 30, 61, *range(101, 113)])
def test_interrupted_anywhere_it_continues_in_all_sizes(pictures, whole, tmp_path, monkeypatch, call):
    """Stops at the n-th time that something is made to last, of 112: the plan, the duplicates, 14 for each shard, the
    report, the manifest of each size and the contact sheet."""
    dest = tmp_path / "data"
    fsync, calls = os.fsync, itertools.count(1)

    def stopping(descriptor):
        if next(calls) == call:
            raise Interrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", stopping)
    with pytest.raises(Interrupt):
        make(pictures, dest)
    assert not list(dest.rglob("*.tmp"))
    finished = tree(whole)
    for name, digest in tree(dest).items():
        assert name.startswith(WORK) or digest == finished[name]
    monkeypatch.setattr(os, "fsync", fsync)
    make(pictures, dest)
    assert tree(dest) == finished
