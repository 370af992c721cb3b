"""training/checkpoint.py: whole or not at all, the newest whole one is found, nothing but safetensors and JSON."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from styleloom.training import checkpoint
from styleloom.training.config import Run
from styleloom.training.networks import build

META = {"seconds": 1.5, "processes": 1, "data_hash": "abc"}


@pytest.fixture
def run(settings):
    return settings("data", "out")


@pytest.fixture
def states():
    return {"G": {"weight": torch.arange(6.0).reshape(2, 3)}, "report": {}}


def save(folder, states, run, nimg, keep=2):
    return checkpoint.save(folder, states, {"nimg": nimg, **META}, run, keep)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Optimizers


def make_optimizer():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return network, torch.optim.Adam(network.parameters(), lr=0.1, betas=(0.0, 0.9))


def step(network, optimizer, only_first=False):
    optimizer.zero_grad(set_to_none=True)
    x = network[0](torch.ones(5, 3)) if only_first else network(torch.ones(5, 3))
    x.square().sum().backward()
    optimizer.step()


def test_an_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path):
    network, optimizer = make_optimizer()
    step(network, optimizer)
    step(network, optimizer, only_first=True)
    state = checkpoint.optimizer_state(optimizer, network)
    assert sorted(state)[:3] == ["0.bias:exp_avg", "0.bias:exp_avg_sq", "0.bias:step"]
    assert (state["0.bias:step"], state["1.bias:step"]) == (2, 1)
    checkpoint.write_tensors(tmp_path / "optimizer.safetensors", state)
    other, fresh = make_optimizer()
    other.load_state_dict(network.state_dict())
    step(other, fresh)  # leaves a state that has to go
    other.load_state_dict(network.state_dict())
    checkpoint.load_optimizer_state(fresh, other, checkpoint.read_tensors(tmp_path / "optimizer.safetensors"))
    for _ in range(2):
        step(network, optimizer)
        step(other, fresh)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_that_never_stepped_has_no_state():
    network, optimizer = make_optimizer()
    assert checkpoint.optimizer_state(optimizer, network) == {}
    step(network, optimizer)
    checkpoint.load_optimizer_state(optimizer, network, {})
    assert checkpoint.optimizer_state(optimizer, network) == {}


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


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("G.safetensors", lambda path: path.unlink(), "No such file"),
        ("G.safetensors", truncate, "cannot read .*G.safetensors"),
        ("G.safetensors", lambda path: path.write_bytes(b""), "cannot read .*G.safetensors"),
        ("run.json", lambda path: path.unlink(), "No such file"),
        ("run.json", lambda path: path.write_text('{"preset'), "Invalid JSON"),
        ("run.json", lambda path: path.write_text('{"batch": "many"}'), "batch: Input should be a valid integer"),
        ("state.json", lambda path: path.unlink(), "No such file"),
        ("state.json", lambda path: path.write_text(""), "Expecting value"),
        ("state.json", lambda path: path.write_text("{}"), "it has no 'nimg'"),
        ("state.json", lambda path: path.write_text("[1]"), "damaged"),
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
    assert about["format"] == "styleloom-snapshot-1"
    assert (about["width"], about["height"], about["channels"]) == (16, 16, 3)


def test_the_newest_snapshot_of_a_run_is_found(snapshot, tmp_path):
    shutil.copytree(snapshot, snapshot.with_name("nimg-000000080"))
    snapshot.with_name("nimg-000000099.tmp").mkdir()
    assert checkpoint.find_snapshot(tmp_path / "run").name == "nimg-000000080"
    assert checkpoint.find_snapshot(snapshot) == snapshot
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=rf"there is no snapshot in {folder}: name a folder"):
            checkpoint.find_snapshot(folder)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format": "styleloom-snapshot-2"}, "its format is 'styleloom-snapshot-2', not 'styleloom-snapshot-1'"),
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


def test_restored_optimizer_state_lies_where_its_parameter_does():
    """A fused optimizer on a GPU needs its step count there; `meta` stands in for the GPU."""
    network = torch.nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.Adam(network.parameters())
    saved = {"weight:step": torch.tensor(3.0), "weight:exp_avg": torch.zeros(2, 2)}
    checkpoint.load_optimizer_state(optimizer, network, saved)
    assert {x.device.type for x in optimizer.state[network.weight].values()} == {"meta"}
