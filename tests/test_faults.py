"""Two ranks to which something happens: nothing is lost, and the same command goes on to the same bits.

faults.py plays the cases; here is judged what became of each.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from styleloom.training.watchdog import HANGS

SCRIPT = Path(__file__).with_name("faults.py")
LONG = ["--total-kimg=0.064", "--keep-checkpoints=9"]  # 16 steps; checkpoints at 20, 40, 60 and 64 images
KILLED, TERMINATED = -signal.SIGKILL, 128 + signal.SIGTERM
LIMIT = 240  # seconds, of waiting for what has to come


def names(*nimgs: int) -> list[str]:
    return [f"nimg-{nimg:09d}" for nimg in nimgs]


WHOLE = names(20, 40, 60, 64)


@pytest.fixture(scope="module")
def played(tmp_path_factory, unlabelled, arguments, python):
    """The folder of all cases, which have been played; full_disk only where a small disk could be mounted."""
    root = tmp_path_factory.mktemp("faults")
    disk = root / "full_disk" / "disk"
    disk.mkdir(parents=True)
    # Two checkpoints do not fit beside the pictures and logs of the steps until then.
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "none", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        disk.rmdir()
    process = python(SCRIPT, "all", root, *arguments(unlabelled, "", *LONG))
    try:
        said = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, said
        yield root
    finally:
        process.kill()  # with it all that it has started ends
        process.communicate()
        if disk.exists():
            time.sleep(1 if process.returncode else 0)  # until they have
            subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def case(played):
    """NAME -> its run's folder, and its tries: statuses, out and err of each rank; checkpoints afterwards."""

    def case(name: str):
        folder = played / name
        tries = folder / "tries.json"
        assert tries.exists(), (folder / "err-0").read_text()
        return folder / "out", [SimpleNamespace(**each) for each in json.loads(tries.read_text())]

    return case


@pytest.fixture(scope="module")
def whole(case):
    """The run to which nothing happened."""
    out, (first,) = case("undisturbed")
    assert (first.statuses, first.err, first.checkpoints) == ([0, 0], ["", ""], WHOLE)
    return out


@pytest.fixture
def assert_same(whole, assert_same_run):
    """(run's folder, but for what it wrote at some images) is the undisturbed run, bit for bit."""

    def assert_same(out: Path, but: int | None = None) -> None:
        if but is not None:
            for kind in ("checkpoints", "snapshots"):
                shutil.rmtree(out / kind / names(but)[0])
            (out / "samples" / f"fakes-{but:09d}.png").unlink()
        assert_same_run(out, whole, checkpoints=4, snapshots=3)
        assert not list(out.rglob("*.tmp"))

    return assert_same


def goes_on(out: Path, its: SimpleNamespace, nimg: int) -> None:
    """That this try took up the checkpoint at `nimg`, said so once, complained of nothing and came to the end."""
    assert its.statuses == [0, 0]
    assert its.out[0].startswith(f"Going on from {out}/checkpoints/{names(nimg)[0]}: ")
    assert its.out[1] == ""
    assert its.err == ["", ""]


def test_the_first_killed_in_the_midst_of_saving(case, assert_same):
    out, (killed, again) = case("killed_while_saving")
    assert killed.statuses == [KILLED, 1]
    assert killed.checkpoints == [*names(20, 40), "nimg-000000060.tmp"]
    assert "process 1 lost touch with the others" in killed.err[1]
    assert 1 <= len(killed.err[1].splitlines()) <= 2
    goes_on(out, again, 40)
    assert_same(out)


def test_who_cannot_end_within_its_grace_is_ended(case, assert_same):
    """Also the first, which is in a collective, so that none of Python's signal handlers runs."""
    out, (stopped, again) = case("out_of_grace")
    assert stopped.statuses == [TERMINATED] * 2
    newest = out / "checkpoints" / names(40)[0]
    line = (
        f"styleloom train: not done within 1 s after SIGTERM (parallel.grace_s); the newest checkpoint is {newest}.\n"
    )
    assert stopped.err == [line] * 2
    assert stopped.checkpoints == names(20, 40)
    goes_on(out, again, 40)
    assert_same(out)


@pytest.mark.parametrize("name", ["waiting_for_data", "told_before_waiting_for_data"])
def test_a_signal_where_one_waits_for_data_that_do_not_come(case, assert_same, name):
    out, (stopped, again) = case(name)
    assert stopped.statuses == [TERMINATED] * 2
    assert stopped.err == ["", ""]
    assert "Stopped at 0.052 kimg and saved." in stopped.out[0]
    assert stopped.checkpoints == names(20, 40, 52)
    goes_on(out, again, 52)
    assert_same(out, but=52)


def test_a_full_disk(case, assert_same):
    folder, tries = case("full_disk")
    if not tries:
        pytest.skip("cannot mount a small disk here")
    out = folder.with_name("disk") / "out"
    full, again = tries
    assert full.statuses == [1, 1]
    said = f"No space left on device: {out}/checkpoints/{names(40)[0]} (free some space and run the same command again"
    assert said in full.err[0]
    assert len(full.err[0].splitlines()) == 1
    assert full.err[1] == ""
    assert full.checkpoints == names(20)
    goes_on(out, again, 20)
    assert_same(out)


def test_a_damaged_checkpoint(case, assert_same):
    out, (killed, again) = case("damaged")
    assert killed.statuses == [1, KILLED]
    assert killed.checkpoints == names(20, 40)
    assert again.statuses == [0, 0]
    assert f"the checkpoint {out}/checkpoints/{names(40)[0]} is damaged (G.safetensors" in again.err[0]
    assert again.err[0].endswith("going back to nimg-000000020.\n")
    assert len(again.err[0].splitlines()) == 1
    assert again.err[1] == ""
    assert again.out[0].startswith(f"Going on from {out}/checkpoints/{names(20)[0]}: ")
    assert again.checkpoints == sorted([*WHOLE, "nimg-000000040.damaged"])
    assert_same(out)


def test_one_that_hangs(case, assert_same):
    out, (hung, again) = case("hanging")
    assert hung.statuses == [HANGS] * 2
    assert "styleloom train: rank 1 on " in hung.err[0]
    assert "has not moved for 5 s (phase Gmain, at 0.052 kimg); the other processes wait for it." in hung.err[0]
    assert "in sleep" in hung.err[1]  # its stacks
    assert hung.checkpoints == names(20, 40)
    goes_on(out, again, 40)
    assert_same(out)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("other_settings", "the processes were started with different settings: batch is 4 on rank 0 ({}), 8 on rank "),
        ("different_code", "the processes run different code: styleloom is "),
        ("no_data", "there is no data set at {out}/nowhere"),
    ],
)
def test_what_is_refused_at_the_start(case, name, says):
    """By all, as it has to be: on several nodes, each has a log of its own."""
    out, (refused,) = case(name)
    assert refused.statuses == [1, 1]
    for said in refused.err:
        assert said.startswith(f"styleloom train: {says.format(os.uname().nodename, out=out.parent)}")
        assert 1 <= len(said.splitlines()) <= 2
    assert not out.exists()


def test_the_versions_that_differ_are_named(case):
    _, (refused,) = case("different_code")
    for said in refused.err:
        assert "(0123456789) on rank 1" in said


def test_a_bit_that_changes_by_itself(case, assert_same):
    out, (altered, again) = case("altered_weight")
    assert altered.statuses == [1, 1]
    for said in altered.err:
        assert "the networks are not the same on all 2 processes any more, at 0.048 kimg" in said  # the next tick
        assert "altered: G.mapping.fc0.weight on rank 1" in said
    assert altered.checkpoints == names(20, 40)
    goes_on(out, again, 40)
    assert_same(out)


# Under torch's launcher


def statuses(folder: Path) -> list[int]:
    return [int((folder / f"status-{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_a_launcher_that_is_told_to_end_and_one_that_starts_killed_ranks_again(
    tmp_path, unlabelled, arguments, python, assert_same, monkeypatch
):
    """SIGTERM to all processes, the launcher included, as schedulers send it: so each rank gets it twice. Then the same
    command, in which the second rank is killed: the launcher starts all again, and that is all there is to do."""
    # Otherwise torch 2.15 keeps one store for all tries, where a rank may find the address of one that is gone.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    out, command = tmp_path / "out", arguments(unlabelled, tmp_path / "out", *LONG)
    process = python(SCRIPT, "rank", "held", tmp_path, *command, ranks=2)
    family: list[psutil.Process] = []
    try:
        give_up = time.monotonic() + LIMIT
        while not all((tmp_path / f"reached-{rank}").exists() for rank in range(2)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up
            time.sleep(0.05)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            each.terminate()
        (tmp_path / "released").touch()
        said = process.communicate(timeout=LIMIT)
        assert statuses(tmp_path) == [TERMINATED] * 2, said
        assert process.returncode == 1  # torch's
        assert said[0].count("Stopped at 0.052 kimg and saved. The same command goes on from there.") == 1

        for rank in range(2):
            (tmp_path / f"status-{rank}").unlink()
        process = python("--max-restarts=2", SCRIPT, "rank", "killed", tmp_path, *command, ranks=2)
        family = [psutil.Process(process.pid)]
        said = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, said
        assert statuses(tmp_path) == [0, 0]
        assert said[0].count(f"Going on from {out}/checkpoints/{names(52)[0]}") == 2
        assert_same(out, but=52)
    finally:
        family += [child for each in family if each.is_running() for child in each.children(recursive=True)]
        for each in family:
            if each.is_running():
                each.kill()
        process.communicate()
