"""training/checkpoint.py: whole or not at all, the newest good one is found, nothing but safetensors and JSON."""

import errno
import json
import os
import shutil
import subprocess
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from styleloom.training import checkpoint
from styleloom.training.config import Run
from styleloom.training.networks import build
from styleloom.training.saver import Saver

META = {"seconds": 1.5, "processes": 1, "data_hash": "abc"}


@pytest.fixture
def run(settings):
    return settings("data", "out")


@pytest.fixture
def states():
    return {"G": {"weight": torch.arange(6.0).reshape(2, 3)}, "report": {}}


def save(folder, states, run, nimg, keep=2, keep_every=0):
    return checkpoint.save(folder, states, {"nimg": nimg, **META}, run, keep, keep_every)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Whole folders


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path, error):
    def fail():
        with checkpoint.whole_folder(tmp_path / "a") as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_a_folder_appears_only_at_the_end(tmp_path):
    with checkpoint.whole_folder(tmp_path / "deep" / "a") as folder:
        (folder / "file").write_text("whole")
        assert names(tmp_path / "deep") == ["a.tmp"]
    assert names(tmp_path / "deep") == ["a"]
    assert (tmp_path / "deep" / "a" / "file").read_text() == "whole"


def test_files_are_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "_sync", lambda path: synced.append((path.name, (tmp_path / "a").exists())))
    with checkpoint.whole_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("whole")
    assert synced == [("file", False), ("a.tmp", False), (tmp_path.name, True)]


def test_an_earlier_folder_of_the_name_stays_until_the_new_one_is_there(tmp_path):
    def write(text):
        with checkpoint.whole_folder(tmp_path / "a") as folder:
            (folder / "file").write_text(text)
            if text == "bad":
                raise ValueError("on the way")

    write("old")
    with pytest.raises(ValueError, match="on the way"):
        write("bad")
    assert (tmp_path / "a" / "file").read_text() == "old"
    write("new")
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_what_another_thread_is_writing_in_the_same_folder_stays(tmp_path):
    (tmp_path / "killed.tmp").mkdir()
    half, go = threading.Event(), threading.Event()

    def write():
        with checkpoint.whole_folder(tmp_path / "a") as folder:
            (folder / "file").write_text("whole")
            half.set()
            assert go.wait(60)

    thread = threading.Thread(target=write)
    thread.start()
    assert half.wait(60)
    try:
        with checkpoint.whole_folder(tmp_path / "b"):
            assert names(tmp_path) == ["a.tmp", "b.tmp"]
    finally:
        go.set()
        thread.join()
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a" / "file").read_text() == "whole"
    (tmp_path / "a.tmp").mkdir()  # as another process would leave it
    with checkpoint.whole_folder(tmp_path / "c"):
        assert names(tmp_path) == ["a", "b", "c.tmp"]


# Tensors


TENSORS = {
    "half": torch.randn(3, 5, dtype=torch.float16),
    "odd": torch.arange(7, dtype=torch.uint8),
    "brain": torch.randn(3, dtype=torch.bfloat16),
    "transposed": torch.randn(4, 6).T,
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "double": torch.randn(2, dtype=torch.float64),
    "step": torch.tensor(7.0),
    "flags": torch.tensor([True, False]),
    "none": torch.empty(0, 3),
    "none at all": torch.empty(0, dtype=torch.uint8),
    "count": torch.tensor([-1, 2**40]),
    'a "name" of ünusual bytes': torch.ones(1, dtype=torch.int32),
    "parameter": torch.nn.Parameter(torch.randn(2)),
}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape)
        assert torch.equal(x, b[name])


@pytest.mark.parametrize("tensors", [TENSORS, {"odd": TENSORS["odd"]}, {"none": TENSORS["none"]}, {}])
def test_tensors_of_every_kind_come_back(tmp_path, run, tensors):
    """Also through the library, as files of its format."""
    folder = save(tmp_path, {"G": tensors}, run, 8)
    assert_same(checkpoint.load(folder)[0]["G"], tensors)
    assert_same(checkpoint.read_tensors(folder / "G.safetensors"), tensors)


def test_tensors_as_the_library_writes_them(tmp_path):
    """Not a promise, but a sign that nothing of the format was overlooked."""
    tensors = {name: x.detach().contiguous() for name, x in TENSORS.items()}
    del tensors["none at all"], tensors["none"]
    checkpoint.write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_a_step_count_does_not_hold_its_file_in_memory(tmp_path, run):
    folder = save(tmp_path, {"optimizer_G": {"w:step": torch.tensor(3.0), "w:exp_avg": torch.zeros(1000)}}, run, 8)
    step = checkpoint.load(folder)[0]["optimizer_G"]["w:step"]
    assert step.untyped_storage().nbytes() == 4


# Checkpoints


def test_a_checkpoint_comes_back(tmp_path, states, run):
    folder = save(tmp_path, states, run, 1234)
    assert folder == tmp_path / "nimg-000001234"
    its, meta, its_run = checkpoint.load(folder)
    assert its.keys() == states.keys()
    assert torch.equal(its["G"]["weight"], states["G"]["weight"])
    assert META.items() <= meta.items()
    assert its_run == run


def test_the_newest_ones_are_kept(tmp_path, states, run):
    for nimg in (5, 999999990, 1000000000, 12):
        save(tmp_path, states, run, nimg, keep=3)
    assert names(tmp_path) == ["nimg-000000012", "nimg-1000000000", "nimg-999999990"]
    assert checkpoint.complete(tmp_path)[-1].name == "nimg-1000000000"


def test_a_checkpoint_that_is_there_is_not_touched(tmp_path, states, run, monkeypatch):
    """A signal just after a checkpoint asks for the same one again. It may be the only one: nothing may be at stake."""
    save(tmp_path, states, run, 8, keep=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", None)
    assert save(tmp_path, states, run, 8, keep=1) == tmp_path / "nimg-000000008"
    checkpoint.load(tmp_path / "nimg-000000008")


def test_unfinished_and_foreign_folders_are_passed_over_and_cleaned_up(tmp_path, states, run):
    assert checkpoint.complete(tmp_path / "nothing") == []
    save(tmp_path, states, run, 8)
    for name in ("nimg-000000016.tmp", "notes", "nimg-12"):
        (tmp_path / name).mkdir()
    (tmp_path / "nimg-000000016.tmp" / "G.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["nimg-000000008"]
    save(tmp_path, states, run, 12)
    assert names(tmp_path) == ["nimg-000000008", "nimg-000000012", "nimg-12", "notes"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("G.safetensors", lambda path: path.unlink(), "G.safetensors: No such file"),
        ("G.safetensors", truncate, r"G.safetensors has \d+ bytes, not \d+"),
        ("G.safetensors", lambda path: path.write_bytes(b""), r"G.safetensors has 0 bytes, not \d+"),
        ("G.safetensors", lambda path: path.write_bytes(path.read_bytes() + b"x"), r"has \d+ bytes, not \d+"),
        ("report.safetensors", lambda path: path.unlink(), "report.safetensors: No such file"),
        ("run.json", lambda path: path.unlink(), "run.json: No such file"),
        ("run.json", truncate, r"run.json has \d+ bytes, not \d+"),
        ("state.json", lambda path: path.unlink(), "state.json: No such file"),
        ("state.json", lambda path: path.write_text(""), "state.json: Expecting value"),
        ("state.json", lambda path: path.write_bytes(b"\xff\xff"), "state.json: 'utf-8' codec"),
        ("state.json", lambda path: path.write_bytes(path.read_bytes()[:-1]), "state.json is not as it was written"),
        ("state.json", lambda path: path.write_text("[1]"), "state.json is not as it was written"),
    ],
)
def test_a_damaged_checkpoint_names_itself_and_the_remedy(tmp_path, states, run, name, damage, what):
    folder = save(tmp_path, states, run, 8)
    damage(folder / name)
    with pytest.raises(ValueError, match=what) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)
    assert "Move that folder away to go on from the one before" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["G.safetensors", "report.safetensors", "run.json", "state.json"])
def test_every_flipped_bit_is_noticed(tmp_path, states, run, name):
    path = save(tmp_path, states, run, 8) / name
    whole, count = path.read_bytes(), 8 * path.stat().st_size
    for bit in {*range(0, count, 37), count - 1}:
        flip(path, bit)
        with pytest.raises(ValueError, match=name):
            checkpoint.load(path.parent)
        path.write_bytes(whole)
    checkpoint.load(path.parent)


def test_every_cut_is_noticed(tmp_path, states, run):
    path = save(tmp_path, states, run, 8) / "state.json"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"state\.json"):
            checkpoint.load(path.parent)


def test_a_file_that_somebody_put_there_does_not_matter(tmp_path, states, run):
    folder = save(tmp_path, states, run, 8)
    (folder / "notes.txt").write_text("mine")
    checkpoint.load(folder)


def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, states, run, monkeypatch):
    """What a full table of open files or a missing permission says of a checkpoint is nothing: no older one serves."""
    for nimg in (8, 16):
        save(tmp_path, states, run, nimg)

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"nimg-000000016"):
        checkpoint.newest_good(tmp_path, print)


def test_a_bad_part_of_the_disk_is_damage(tmp_path, states, run, monkeypatch):
    for nimg in (8, 16):
        save(tmp_path, states, run, nimg)
    real = open

    def fail(path, *more):
        if str(path).endswith("16/G.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *more)

    monkeypatch.setattr("builtins.open", fail)
    name, _, told = found(tmp_path)
    assert name == "nimg-000000008"
    assert "nimg-000000016 is damaged (G.safetensors: Input/output error)" in told[0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format": None, "xxh3": None}, "it is older than styleloom-checkpoint-3"),
        ({"format": "styleloom-checkpoint-4"}, "its format is 'styleloom-checkpoint-4', not 'styleloom-checkpoint-3'"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(tmp_path, states, run, change, what):
    path = save(tmp_path, states, run, 8) / "state.json"
    about = {key: x for key, x in (json.loads(path.read_text()) | change).items() if x is not None}
    path.write_bytes(checkpoint._sealed(about) if "format" in about else json.dumps(about).encode())
    with pytest.raises(ValueError, match=what):
        checkpoint.load(path.parent)


def test_a_run_that_this_version_does_not_know_is_refused(tmp_path, states, run):
    folder = save(tmp_path, states, run.model_copy(update={"batch": -4}), 8)
    with pytest.raises(ValueError, match=r"run\.json: batch: Input should be greater than or equal to 1"):
        checkpoint.load(folder)


# The newest good one


@pytest.fixture
def three(tmp_path, run):
    """A folder with checkpoints at 8, 16 and 24 images, each with its own weights."""
    for nimg in (8, 16, 24):
        save(tmp_path, {"G": {"weight": torch.tensor([float(nimg)])}}, run, nimg, keep=3)
    return tmp_path


def found(folder):
    """(name, weights, lines told) of the newest good one."""
    told: list[str] = []
    good = checkpoint.newest_good(folder, told.append)
    assert good is not None
    path, states, meta, _ = good
    assert path.name == f"nimg-{meta['nimg']:09d}"
    return path.name, states["G"]["weight"].flatten()[0].item(), told


def test_the_newest_one_is_taken_and_nothing_is_said(three):
    assert found(three) == ("nimg-000000024", 24, [])


def test_damaged_ones_are_told_of_and_the_one_before_is_taken(three):
    flip(three / "nimg-000000024" / "G.safetensors", 100)
    truncate(three / "nimg-000000016" / "run.json")
    before = {path: path.stat().st_mtime_ns for path in three.rglob("*")}
    name, weight, told = found(three)
    assert (name, weight) == ("nimg-000000008", 8)
    assert len(told) == 2
    assert told[0] == (
        f"the checkpoint {three / 'nimg-000000024'} is damaged (G.safetensors is not as it was written: its hash "
        "differs): going back to nimg-000000008."
    )
    assert f"{three / 'nimg-000000016'} is damaged (run.json has" in told[1]
    assert {path: path.stat().st_mtime_ns for path in three.rglob("*")} == before


def test_a_damaged_one_before_the_newest_does_not_matter(three):
    truncate(three / "nimg-000000016" / "state.json")
    assert found(three) == ("nimg-000000024", 24, [])


def test_where_there_are_none_training_may_begin(tmp_path):
    (tmp_path / "nimg-000000008.damaged").mkdir()
    (tmp_path / "nimg-000000008.tmp").mkdir()
    assert checkpoint.newest_good(tmp_path, print) is None
    assert checkpoint.newest_good(tmp_path / "missing", print) is None


def test_if_all_are_damaged_nothing_begins_anew(three):
    told = []
    for folder in checkpoint.complete(three):
        (folder / "G.safetensors").unlink()
    with pytest.raises(ValueError, match=r"nimg-000000024: G.safetensors: No such file") as caught:
        checkpoint.newest_good(three, told.append)
    assert f"no checkpoint in {three} can be read" in str(caught.value)
    assert "move that folder away" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    assert told == []


def test_a_damaged_one_is_set_aside_and_written_anew(three, run):
    truncate(three / "nimg-000000024" / "G.safetensors")
    spoilt = (three / "nimg-000000024" / "G.safetensors").read_bytes()
    aside = checkpoint.set_aside(three, three / "nimg-000000016")
    assert aside == [three / "nimg-000000024.damaged"]
    assert (aside[0] / "G.safetensors").read_bytes() == spoilt
    assert [path.name for path in checkpoint.complete(three)] == ["nimg-000000008", "nimg-000000016"]
    save(three, {"G": {"weight": torch.tensor([25.0])}}, run, 24, keep=3)
    assert found(three) == ("nimg-000000024", 25, [])


def test_what_is_set_aside_stays(three):
    for _ in range(3):
        shutil.copytree(three / "nimg-000000016", three / "nimg-000000024", dirs_exist_ok=True)
        truncate(three / "nimg-000000024" / "G.safetensors")
        checkpoint.set_aside(three, three / "nimg-000000016")
    assert checkpoint.set_aside(three, three / "nimg-000000016") == []
    aside = ["nimg-000000024.damaged", "nimg-000000024.damaged-1", "nimg-000000024.damaged-2"]
    assert names(three) == ["nimg-000000008", "nimg-000000016", *aside]


@pytest.mark.parametrize("good", ["nimg-000000016", None])
def test_one_that_another_training_has_saved_meanwhile_is_not_set_aside(three, good):
    """As where a run was requeued while its last try still saved."""
    before = names(three)
    with pytest.raises(ValueError, match="another training has just saved"):
        checkpoint.set_aside(three, good and three / good)
    assert names(three) == before


# Which are kept


@pytest.mark.parametrize(
    ("nimgs", "keep", "keep_every", "gone"),
    [
        ([], 2, 0, []),
        ([10], 1, 0, []),
        ([10, 20, 30], 2, 0, [10]),
        ([30, 10, 20], 1, 0, [10, 20]),
        ([40, 80, 120, 160, 200], 1, 100, [40, 80, 160]),  # 120 is the first after 100; 200 the newest and a multiple
        ([40, 80, 120, 160, 220, 260], 1, 100, [40, 80, 160]),
        ([100, 140, 180, 310, 350, 390], 1, 100, [140, 180, 350]),  # none after 200
        ([40, 80], 1, 100, [40]),  # the run's first is not kept for being after 0
        ([40, 80, 120], 3, 100, []),
        ([40, 80, 120], 1, 1, []),
    ],
)
def test_retention_by_example(nimgs, keep, keep_every, gone):
    assert checkpoint.doomed(nimgs, keep, keep_every) == gone


def test_the_newest_checkpoint_of_better_days_stays():
    nimgs = [20, 40, 60, 80, 100]
    assert checkpoint.doomed(nimgs, 1, well=59) == [20, 60, 80]
    assert checkpoint.doomed(nimgs, 2, well=60) == [20, 40]
    assert checkpoint.doomed(nimgs, 1, well=19) == [20, 40, 60, 80]  # there is none


NIMGS = st.lists(st.integers(0, 500), unique=True)


@given(NIMGS, st.integers(1, 5), st.integers(0, 120))
def test_retention_after_every_save_keeps_what_retention_at_the_end_does(nimgs, keep, keep_every):
    def retained(nimgs):
        return set(nimgs) - set(checkpoint.doomed(nimgs, keep, keep_every))

    at_the_end, now = retained(nimgs), set()
    for nimg in sorted(nimgs):
        now = retained(now | {nimg})
        assert nimg in now
    assert now == at_the_end == retained(at_the_end)
    assert set(sorted(nimgs)[-keep:]) <= now
    for multiple in range(keep_every, 501, keep_every) if keep_every else []:
        assert min((nimg for nimg in nimgs if nimg >= multiple), default=None) in {None, *now}


def test_saving_keeps_some_for_ever(tmp_path, states, run):
    for nimg in range(8, 72, 8):
        save(tmp_path, states, run, nimg, keep=1, keep_every=20)
    assert names(tmp_path) == [f"nimg-{nimg:09d}" for nimg in (24, 40, 64)]


# A full disk


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, states, run, monkeypatch):
    folder = save(tmp_path, states, run, 8, keep=1)
    real = checkpoint._sync

    def full(path):
        if path.name == "run.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path, states, run, 16, keep=1)
    assert caught.value.filename == str(tmp_path / "nimg-000000016")
    assert checkpoint.complete(tmp_path) == [folder]
    assert names(tmp_path) == [folder.name]
    checkpoint.load(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, run):
    states = {"G": {"weight": torch.rand(25000)}}  # 100 kB
    folders = [save(small_disk, states, run, nimg, keep=5) for nimg in (8, 16)]
    with pytest.raises(OSError, match="No space left") as caught:
        save(small_disk, states, run, 24, keep=5)
    assert "nimg-000000024" in caught.value.filename
    assert checkpoint.complete(small_disk) == folders
    assert len(names(small_disk)) == 2
    for folder in folders:
        assert torch.equal(checkpoint.load(folder)[0]["G"]["weight"], states["G"]["weight"])
    save(small_disk, {"G": {}}, run, 32, keep=1)  # there was room for this


def test_a_disk_that_gets_full_in_the_background(small_disk, run):
    states = {"G": {"weight": torch.rand(25000)}}
    with Saver() as saver:
        for nimg in (8, 16):
            saver.submit(states, lambda states, nimg=nimg: save(small_disk, states, run, nimg, keep=5))
        saver.submit(states, lambda states: save(small_disk, states, run, 24, keep=5))
        with pytest.raises(OSError, match="No space left") as caught:
            saver.finish()
    assert caught.value.errno == errno.ENOSPC
    assert "nimg-000000024" in caught.value.filename
    assert names(small_disk) == ["nimg-000000008", "nimg-000000016"]
    good = checkpoint.newest_good(small_disk, pytest.fail)
    assert good is not None
    assert torch.equal(good[1]["G"]["weight"], states["G"]["weight"])


# Snapshots


@pytest.fixture
def networks(run):
    generator, discriminator = build(run, 16, 16, 3, 2)
    for parameter in generator.parameters():
        parameter.data += 0.1
    generator.mapping.w_avg += 0.5
    return generator.eval(), discriminator


@pytest.fixture
def snapshot(tmp_path, networks, run):
    run = run.model_copy(update={"data": run.data.model_copy(update={"labels": True})})
    generator, discriminator = networks
    folder = tmp_path / "run" / "snapshots"
    return checkpoint.save_snapshot(folder, generator, discriminator, run, 40, 16, 16, 3, ["cat", "dog"])


def test_a_snapshot_draws_the_same_images(snapshot, networks):
    generator, about = checkpoint.load_generator(snapshot)
    z, c = torch.randn(3, 8), torch.eye(2)[[0, 1, 1]]
    for psi in (1, 0.5):
        assert torch.equal(generator(z, c, psi), networks[0](z, c, psi))
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    assert (about["nimg"], about["class_names"]) == (40, ["cat", "dog"])
    assert isinstance(about["run"], Run)


def test_a_snapshot_is_safetensors_and_json(snapshot, networks):
    assert names(snapshot) == ["discriminator.safetensors", "generator.safetensors", "snapshot.json"]
    assert load_file(snapshot / "discriminator.safetensors").keys() == networks[1].state_dict().keys()
    about = json.loads((snapshot / "snapshot.json").read_text())
    assert about["format"] == "styleloom-snapshot-2"
    assert (about["level"], about["alpha"]) == (2, 1.0)
    assert (about["width"], about["height"], about["channels"]) == (16, 16, 3)


def test_the_newest_snapshot_of_a_run_is_found(snapshot, tmp_path):
    shutil.copytree(snapshot, snapshot.with_name("nimg-000000080"))
    snapshot.with_name("nimg-000000099.tmp").mkdir()
    assert checkpoint.find_snapshot(tmp_path / "run").name == "nimg-000000080"
    assert checkpoint.find_snapshot(snapshot) == snapshot
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=rf"there is no snapshot in {folder}: name a folder"):
            checkpoint.find_snapshot(folder)


# The best snapshot


@pytest.fixture
def scored(tmp_path, networks, run):
    """(nimg, score=None, name="swd") writes a snapshot of a run with that score."""
    generator, discriminator = networks

    def scored(nimg, score=None, name="swd"):
        folder = tmp_path / "run" / "snapshots"
        classes = ["cat", "dog"]
        return checkpoint.save_snapshot(
            folder, generator, discriminator, run, nimg, 16, 16, 3, classes, score=score, score_name=name
        )  # fmt: skip

    return scored


def best(tmp_path):
    link = tmp_path / "run" / "snapshots" / "best"
    return os.readlink(link) if link.is_symlink() else None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([None], None),
        ([3.0], 1),
        ([3.0, 2.0, 4.0], 2),
        ([3.0, 2.0, 2.0], 2),
        ([3.0, None, 4.0], 1),
        ([3.0, float("nan"), -float("inf")], 1),
        ([float("nan")], None),
        ([1.0, 5, (9.0, "fid"), (10.0, "fid")], 3),  # of another measure: not to be compared
        ([2.0, (1.0, "fid"), None], 2),
    ],
)
def test_the_best_snapshot_has_the_lowest_score(tmp_path, scored, scores, expected):
    for nimg, score in enumerate(scores, 1):
        scored(nimg, *score if isinstance(score, tuple) else (score,))
    assert best(tmp_path) == (expected and f"nimg-{expected:09d}")
    assert "best.tmp" not in names(tmp_path / "run" / "snapshots")


def test_the_best_one_is_given_by_its_link(tmp_path, scored):
    first, second = scored(1, 2.0), scored(2, 3.0)
    found = checkpoint.find_snapshot(tmp_path / "run" / "snapshots" / "best")
    assert found.samefile(first)
    assert found.name == first.name  # who reads on is not led elsewhere in between
    assert checkpoint.find_snapshot(tmp_path / "run") == second
    assert checkpoint.complete(tmp_path / "run" / "snapshots") == [first, second]
    checkpoint.load_generator(tmp_path / "run" / "snapshots" / "best")
    about = checkpoint.read_snapshot(first)
    assert (about["score"], about["score_name"]) == (2.0, "swd")


def test_a_score_that_is_no_number_is_written_as_json(scored):
    assert '"score": null' in (scored(1, float("nan")) / "snapshot.json").read_text()


def test_a_damaged_snapshot_is_not_the_best(tmp_path, scored):
    (scored(1, 2.0) / "snapshot.json").write_text("{")
    scored(2, 3.0)
    assert best(tmp_path) == "nimg-000000002"


def test_a_link_to_what_is_gone_goes(tmp_path, scored):
    shutil.rmtree(scored(1, 2.0))
    scored(2)
    assert best(tmp_path) is None


def test_without_symlinks_there_is_no_link(tmp_path, scored, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refuse)
    path = scored(1, 2.0)
    assert names(tmp_path / "run" / "snapshots") == [path.name]
    assert checkpoint.best_snapshot(path.parent) == path


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4, 5]), (1, [2, 5]), (2, [2, 4, 5]), (4, [2, 3, 4, 5])])
def test_the_newest_snapshots_and_the_best_are_kept(tmp_path, scored, keep, left):
    folder = tmp_path / "run" / "snapshots"
    for nimg, score in enumerate([3.0, 1.0, 2.0, 4.0, None], 1):
        scored(nimg, score)
    for _ in range(2):
        checkpoint.retain_snapshots(folder, keep)
        assert names(folder) == ["best", *(f"nimg-{nimg:09d}" for nimg in left)]
    assert best(tmp_path) == "nimg-000000002"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format": "styleloom-snapshot-3"}, "its format is 'styleloom-snapshot-3', not 'styleloom-snapshot-2'"),
        ({"run": {"batch": "many"}}, "batch: Input should be a valid integer"),
        ({"width": None}, "it has no 'width'"),
    ],
)
def test_a_snapshot_of_another_version_is_refused(snapshot, change, what):
    about = json.loads((snapshot / "snapshot.json").read_text()) | change
    (snapshot / "snapshot.json").write_text(json.dumps({key: x for key, x in about.items() if x is not None}))
    with pytest.raises(ValueError, match=what) as caught:
        checkpoint.load_generator(snapshot)
    assert f"{snapshot / 'snapshot.json'} is not a snapshot that this version reads" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_snapshot_of_before_there_was_growth_is_whole(snapshot):
    about = json.loads((snapshot / "snapshot.json").read_text()) | {"format": "styleloom-snapshot-1"}
    del about["level"], about["alpha"]
    (snapshot / "snapshot.json").write_text(json.dumps(about))
    generator, _ = checkpoint.load_generator(snapshot)
    assert (generator.level, generator.alpha, generator.size) == (2, 1.0, (16, 16))


def test_a_damaged_snapshot_names_its_file(snapshot):
    truncate(snapshot / "generator.safetensors")
    with pytest.raises(ValueError, match=r"cannot read .*generator\.safetensors"):
        checkpoint.load_generator(snapshot)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda x: x | {"mapping.w_avg": torch.zeros(9)}, r"mapping.w_avg is \(9,\) there, \(8,\) here"),
        (lambda x: {k: v for k, v in x.items() if k != "mapping.w_avg"}, "mapping.w_avg is nothing there"),
        (lambda x: x | {"extra": torch.zeros(1)}, r"extra is \(1,\) there, nothing here"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(snapshot, change, what):
    tensors = change(load_file(snapshot / "generator.safetensors"))
    save_file(tensors, snapshot / "generator.safetensors")
    with pytest.raises(ValueError, match=what):
        checkpoint.load_generator(snapshot)
