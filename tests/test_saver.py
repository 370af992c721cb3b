"""training/saver.py: what was submitted is what is written, one at a time, and errors come to the front."""

import errno
import os
import threading

import pytest
import torch

from styleloom.training import checkpoint
from styleloom.training.config import write_run
from styleloom.training.saver import Saver, to_host

META = {"seconds": 1.5, "processes": 1, "data_hash": "abc"}


@pytest.fixture
def run(settings):
    return settings("data", "out")


def states(value: float = 0.0) -> checkpoint.States:
    return {"G": {"weight": torch.full((3, 4), value), "step": torch.tensor(value)}, "report": {}}


def writes(folder, run, nimg, keep=2):
    """What `submit` is to be given for a checkpoint at `nimg`."""
    return lambda states: checkpoint.save(folder, states, {"nimg": nimg, **META}, run, keep)


def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "folder")


class Gate:
    """A write that has begun when `begun` is set and goes on when `open` is."""

    def __init__(self, write=lambda states: None):
        self.write, self.begun, self.open = write, threading.Event(), threading.Event()

    def __call__(self, states):
        self.begun.set()
        assert self.open.wait(60)
        return self.write(states)


def test_what_is_written_is_what_was_submitted(tmp_path, run):
    mine, gate = states(1.0), Gate(writes(tmp_path, run, 8))
    with Saver() as saver:
        saver.submit(mine, gate)
        assert gate.begun.wait(60)
        for x in mine["G"].values():
            x.fill_(2.0)
        mine["G"]["new"] = torch.zeros(1)
        gate.open.set()
    its = checkpoint.load(tmp_path / "nimg-000000008")[0]
    assert its.keys() == {"G", "report"}
    assert its["G"].keys() == {"weight", "step"}
    assert all((x == 1).all() for x in its["G"].values())


def test_every_save_is_its_own(tmp_path, run):
    """The memory of the copy is used again, in shapes and under names that may have changed."""
    with Saver() as saver:
        for nimg in (8, 16, 24):
            mine = states(nimg)
            mine["report"][f"loss{nimg}"] = torch.full((nimg,), 1.0)
            mine["G"]["grows"] = torch.full((nimg, 2), 1.0).T
            saver.submit(mine, writes(tmp_path, run, nimg, keep=3))
    for nimg in (8, 16, 24):
        its = checkpoint.load(tmp_path / f"nimg-{nimg:09d}")[0]
        assert its["G"]["weight"].eq(nimg).all()
        assert its["G"]["grows"].shape == (2, nimg)
        assert its["report"].keys() == {f"loss{nimg}"}


def test_a_copy_uses_its_memory_again_where_it_fits():
    first = to_host(states(1.0), {})
    memory = first["G"]["weight"].data_ptr()
    second = to_host(states(2.0), first)
    assert second["G"]["weight"].data_ptr() == memory
    assert second["G"]["weight"].eq(2).all()
    other = to_host({"G": {"weight": torch.ones(3, 4, dtype=torch.float64)}}, second)
    assert other["G"]["weight"].dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_copy_from_a_gpu_is_whole_and_pinned():
    mine = {"G": {"weight": torch.zeros(64, 2**20, device="cuda"), "step": torch.tensor(1.0)}}
    memory: checkpoint.States = {}
    for value in range(3):
        mine["G"]["weight"].fill_(value)  # queued: the copy has to come after it, and be over before the next
        memory = to_host(mine, memory)
        mine["G"]["weight"].fill_(-1)
        assert memory["G"]["weight"].is_pinned()
        assert not memory["G"]["step"].is_pinned()
        assert memory["G"]["weight"].eq(value).all()


def test_one_save_at_a_time():
    log, gate = [], Gate(lambda states: log.append("first written"))
    with Saver() as saver:

        def second():
            saver.submit(states(), lambda states: log.append("second written"))
            log.append("second submitted")

        saver.submit(states(), gate)
        log.append("first submitted")  # while it is not written
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        gate.open.set()
        thread.join()
    assert log[:2] == ["first submitted", "first written"]
    assert sorted(log[2:]) == ["second submitted", "second written"]


@pytest.mark.parametrize("raises", [Saver.check, Saver.finish, lambda saver: saver.submit(states(), print)])
def test_what_went_wrong_behind_is_raised_in_front_once(raises):
    with Saver() as saver:
        saver.submit(states(), full)
        assert saver._writing is not None
        saver._writing.exception(60)
        with pytest.raises(OSError, match="No space left") as caught:
            raises(saver)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "folder")
        saver.check()
        saver.finish()
        written = []
        saver.submit(states(), written.append)  # the next one may fit again
    assert len(written) == 1


def test_checking_does_not_wait():
    gate = Gate()
    with Saver() as saver:
        saver.check()
        saver.submit(states(), gate)
        assert gate.begun.wait(60)
        saver.check()
        gate.open.set()


def test_leaving_the_block_waits_and_raises():
    written = []
    with Saver() as saver:
        gate = Gate(written.append)
        saver.submit(states(), gate)
        threading.Timer(0.05, gate.open.set).start()
    assert len(written) == 1
    saver = Saver()
    with pytest.raises(OSError, match="No space left"), saver:
        saver.submit(states(), full)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block_waits_for_the_save_and_stays_itself(error):
    written: list[checkpoint.States] = []
    gate = Gate(written.append)

    def diverge():
        with Saver() as saver:
            saver.submit(states(), gate)
            threading.Timer(0.05, gate.open.set).start()
            raise error("diverged")

    with pytest.raises(error, match="diverged") as caught:
        diverge()
    assert len(written) == 1
    assert not getattr(caught.value, "__notes__", [])


def test_an_exception_in_the_block_is_not_hidden_by_that_of_the_save():
    def diverge():
        with Saver() as saver:
            saver.submit(states(), full)
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged") as caught:
        diverge()
    assert "Nor could the last save be written" in caught.value.__notes__[0]
    assert "No space left" in caught.value.__notes__[0]


def test_the_thread_ends_with_the_block():
    before = threading.active_count()
    with Saver() as saver:
        assert threading.active_count() == before  # none before it is needed: processes that read data are forked
        saver.submit(states(), lambda states: None)
    assert threading.active_count() == before


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, run, monkeypatch):
    with Saver() as saver:
        saver.submit(states(1.0), writes(tmp_path, run, 8, keep=1))
        saver.finish()
        monkeypatch.setattr(checkpoint, "_sync", full)
        saver.submit(states(2.0), writes(tmp_path, run, 16, keep=1))
        with pytest.raises(OSError, match="No space left") as caught:
            saver.finish()
        assert caught.value.filename == str(tmp_path / "nimg-000000016")
        assert [path.name for path in tmp_path.iterdir()] == ["nimg-000000008"]
        checkpoint.load(tmp_path / "nimg-000000008")
        monkeypatch.undo()
        saver.submit(states(2.0), writes(tmp_path, run, 16, keep=1))
    assert [path.name for path in tmp_path.iterdir()] == ["nimg-000000016"]


KILLED = """
import sys, threading
from pathlib import Path
import torch
from styleloom.training import checkpoint
from styleloom.training.config import read_run
from styleloom.training.saver import Saver

folder, run = Path(sys.argv[1]), read_run(Path(sys.argv[2]))

def save(nimg):
    meta = {"nimg": nimg, "seconds": 1.5, "processes": 1, "data_hash": "abc"}
    states = {"G": {"weight": torch.full((3, 4), float(nimg))}}
    saver.submit(states, lambda states: checkpoint.save(folder, states, meta, run, 1))

def stop(path):  # where the files are written, and nothing has its name
    print("half", flush=True)
    threading.Event().wait()

with Saver() as saver:
    save(8)
    saver.finish()
    checkpoint._sync = stop
    save(16)
"""


def test_a_kill_in_the_midst_of_a_save_leaves_the_earlier_checkpoint(tmp_path, run, python):
    folder = tmp_path / "checkpoints"
    write_run(run, tmp_path / "run.json")
    process = python("-c", KILLED, folder, tmp_path / "run.json")
    try:
        said = process.stdout.readline()
    finally:
        process.kill()
        rest = process.communicate(timeout=60)
    assert said == "half\n", rest
    assert sorted(path.name for path in folder.iterdir()) == ["nimg-000000008", "nimg-000000016.tmp"]
    good = checkpoint.newest_good(folder, pytest.fail)
    assert good is not None
    assert good[0].name == "nimg-000000008"
    assert good[1]["G"]["weight"].eq(8).all()
    with Saver() as saver:
        saver.submit(states(16.0), writes(folder, run, 16))
    assert sorted(path.name for path in folder.iterdir()) == ["nimg-000000008", "nimg-000000016"]
