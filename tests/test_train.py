"""scripts/train.py and scripts/cli.py: whatever a user gets wrong ends in a line or two that say how to mend it."""

import json
import shutil
import sys
import time

import psutil
import pytest
import torch

from styleloom.datasets.manifest import load_index, read_manifest
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.scripts import cli, train
from styleloom.training.config import PRESETS
from styleloom.training.distributed import Team
from styleloom.training.networks import build
from styleloom.training.trainer import Training


@pytest.fixture
def data(unlabelled, tmp_path):
    """A data set to be spoilt."""
    return shutil.copytree(unlabelled, tmp_path / "data")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# The data set


def test_a_missing_data_set(arguments, refused, tmp_path, out):
    complaint = refused(train.main, *arguments(tmp_path / "none", out))
    assert f"there is no data set at {tmp_path / 'none'}: make one with styleloom prepare" in complaint
    assert not out.exists()


def test_an_empty_data_set(arguments, refused, tmp_path, out):
    (tmp_path / "empty").mkdir()
    complaint = refused(train.main, *arguments(tmp_path / "empty", out))
    assert f"{tmp_path / 'empty'} is not a data set: no manifest.json; make one with styleloom prepare" in complaint
    assert not out.exists()


def test_a_half_written_data_set(arguments, refused, data, out):
    (data / "manifest.json").unlink()
    (data / ".prepare").mkdir()
    complaint = refused(train.main, *arguments(data, out))
    assert f"{data} is half-written" in complaint
    assert "Run the same prepare again" in complaint


@pytest.mark.parametrize("text", ["", "{", '{"format": "another"}'])
def test_a_damaged_manifest(arguments, refused, data, out, text):
    (data / "manifest.json").write_text(text)
    complaint = refused(train.main, *arguments(data, out))
    assert str(data / "manifest.json") in complaint
    assert "prepare it again" in complaint


def test_a_truncated_shard(arguments, refused, data, out):
    name = read_manifest(data).shards[2].name
    with open(data / name, "r+b") as file:
        file.truncate(5000)
    complaint = refused(train.main, *arguments(data, out))
    assert f"{data / name} has 5000 bytes, the manifest says" in complaint
    assert "prepare it again" in complaint
    assert not out.exists()


def test_a_missing_shard(arguments, refused, data, out):
    name = read_manifest(data).shards[2].name
    (data / name).unlink()
    complaint = refused(train.main, *arguments(data, out))
    assert f"{data / name} is missing" in complaint
    assert "prepare it again" in complaint


def flip(data) -> str:
    """Changes a byte in an image, and nothing of the size. Returns the shard's name."""
    shard = read_manifest(data).shards[1]
    offset, length, *_ = load_index(data, shard)[2]
    content = bytearray((data / shard.name).read_bytes())
    content[offset + length // 2] ^= 255
    (data / shard.name).write_bytes(content)
    return shard.name


@pytest.mark.parametrize("verify", ["auto", "hash"])
def test_a_shard_that_changed_but_not_in_size(arguments, refused, data, out, verify):
    name = flip(data)
    complaint = refused(train.main, *arguments(data, out, f"--data.verify={verify}"))
    assert f"{data / name}: its sha256 is not the manifest's" in complaint
    assert "prepare the data set again" in complaint
    assert not out.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_shard_that_was_not_hashed_is_found_when_read(arguments, refused, data, out, workers):
    name = flip(data)
    more = ["--data.verify=size", "--total-kimg=9", "--data.max-bad=0", f"--data.workers={workers}"]
    complaint = refused(train.main, *arguments(data, out, *more))
    assert name in complaint
    assert "its bytes are not those that were indexed" in complaint
    assert "--verify` lists what is wrong" in complaint


def test_a_bad_sample_is_replaced_counted_and_told(arguments, call, data, out):
    name = flip(data)
    more = ["--data.verify=size", "--data.max-bad=0.5", "--total-kimg=0.096"]  # more than two epochs
    more += ["--health.images=4"]  # of which the bad one is none
    status, text, err = call(train.main, *arguments(data, out, *more))
    assert status == 0
    assert err.count(f"{name}, row 2 (00000011.png): its bytes are not those that were indexed") == 1
    assert err.count("It is replaced.") == 1
    told = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert len(told) in (2, 3)
    assert {(each["shard"], each["row"], each["key"], each["rank"]) for each in told} == {(name, 2, "00000011.png", 0)}
    ticks = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert sum(tick["data/replaced"] * 12 for tick in ticks) == pytest.approx(len(told))  # of 12 images a tick
    assert "OF THE SAMPLES REPLACED" in text


def test_too_many_bad_samples_stop_the_run_and_name_the_last(arguments, refused, data, out):
    name = flip(data)
    complaint = refused(train.main, *arguments(data, out, "--data.verify=none", "--data.max-bad=0"))
    assert "1 of " in complaint
    assert "more than the share of 0 that data.max_bad allows" in complaint
    assert name in complaint


def test_no_labels_for_a_conditional_run(arguments, refused, unlabelled, out):
    complaint = refused(train.main, *arguments(unlabelled, out, "--data.labels"))
    assert f"data.labels asks for a class-conditional run, but {unlabelled} has no labels" in complaint
    assert "prepare it with --labels, or leave data.labels out" in complaint
    assert not out.exists()


# The arguments


def test_an_unknown_preset(refused):
    complaint = refused(train.main, "stylegan9", "--out", "x")
    assert "there is no preset 'stylegan9'. There are: stylegan2-cpu, " in complaint


def test_neither_data_nor_out(refused, unlabelled, out):
    assert "--data.path DATASET" in refused(train.main, "stylegan2-cpu", "--out", out)
    assert "--out DIR" in refused(train.main, "stylegan2-cpu", "--data.path", unlabelled)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--data.pth", "x"], "--data.pth, x. Perhaps you meant --data.path?"),
        (["--total-kimgs", "3"], "--total-kimgs, 3. Perhaps you meant --total-kimg?"),
        (["--batch", "many"], "--batch: invalid literal for int() with base 10: 'many'"),
        (["--precision", "fp8"], "Expected one of ('fp32', 'bf16', 'fp16')"),
        (["--recipe.lr", "-1"], "lr Input should be greater than 0"),
        (["--keep-checkpoints", "0"], "keep_checkpoints Input should be greater than or equal to 1"),
        (["--seed=-1"], "seed Input should be greater than or equal to 0"),
        (["--batch", "5"], "batch 5 in 1 passes does not divide into minibatch-std groups of 2: change batch"),
        (["--passes", "4"], "batch 4 in 4 passes does not divide"),
    ],
)
def test_fields_and_values_that_do_not_exist(refused, arguments, unlabelled, out, more, named):
    complaint = refused(train.main, *arguments(unlabelled, out, *more))
    assert named in complaint
    assert "pydantic" not in complaint
    assert "input_value" not in complaint
    assert not out.exists()


def test_complaints_are_as_short_where_the_terminal_is_not_utf8(refused, arguments, unlabelled, out, monkeypatch):
    monkeypatch.setattr("tyro._fmtlib._should_use_utf8_drawing_chars", lambda: False)
    complaint = refused(train.main, *arguments(unlabelled, out, "--data.pth", "x"))
    expected = "styleloom train stylegan2-cpu: Unrecognized options: --data.pth, x. Perhaps you meant --data.path?\n"
    assert complaint == expected


def test_batches_that_do_not_divide_among_the_processes_are_refused(settings, unlabelled, monkeypatch):
    team = Team()
    team.world = 4
    monkeypatch.setattr(team, "gather", lambda objects: objects)
    with pytest.raises(ValueError, match=r"batch 4 over 4 processes in 1 passes leaves 1 images a pass.*mbstd_group 2"):
        Training(settings(unlabelled, ""), team)


def test_an_out_that_is_a_file(refused, arguments, unlabelled, out):
    out.write_text("precious")
    complaint = refused(train.main, *arguments(unlabelled, out))
    assert str(out) in complaint
    assert out.read_text() == "precious"


# The dry run


def test_a_dry_run_tells_and_writes_nothing(call, arguments, unlabelled, settings, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said, err = call(train.main, *arguments(unlabelled, out, "--passes=2", "--dry-run"))
    assert (status, err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    resolved = said[said.index("{") : said.rindex("}") + 1]
    assert json.loads(resolved) == settings(unlabelled, out, "--passes=2").model_dump(mode="json")
    for text in (
        "42 images of 16x16, 3 channels, no classes",
        "Processes: 1, and 0 that read data for each; 2 passes.",
        "0 to 0.048 kimg at 16 px: 12 iterations of 4 images (4 on each process), lr 0.0025.",
        "ms (4 images)",
        "ms (2 images, every 2 iterations)",
        "ms (4 images, every 3 iterations)",
        "R1 gamma 10.",
        "Every 0.012 kimg a progress line, every 0.02 a checkpoint, every 0.028 a snapshot",
        "ms an iteration",
        "img/s",
        "for the whole run",
        "GB of memory a process",
        "MB a checkpoint",
    ):
        assert text in said


def test_a_dry_run_counts_parameters(call, arguments, unlabelled, settings, out):
    _, said, _ = call(train.main, *arguments(unlabelled, out, "--dry-run"))
    for name, network in zip("GD", build(settings(unlabelled, out), 16, 16, 3, 0), strict=True):
        assert f"\n{name}: {sum(p.numel() for p in network.parameters()):,} parameters" in said


def test_a_dry_run_refuses_what_training_would(refused, arguments, tmp_path, out):
    assert "there is no data set" in refused(train.main, *arguments(tmp_path / "none", out, "--dry-run"))


# Help, and the command itself


def test_help(call):
    status, said, _ = call(train.main, "--help")
    assert status == 0
    assert "usage: styleloom train PRESET" in said
    assert all(preset in said for preset in PRESETS)
    status, said, _ = call(train.main, "stylegan2-cpu", "--help")
    assert status == 0
    for text in ("--recipe.r1-gamma", "--total-kimg", "--data.path", "Everything random follows from it"):
        assert text in said
    status, said, _ = call(train.main)
    assert status == 2
    assert "presets:" in said


def command(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["styleloom", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def test_the_command(monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, "--help")
    assert status == 0
    assert all(name in out for name in cli.COMMANDS)
    assert command(monkeypatch, capsys)[0] == 2
    status, _, err = command(monkeypatch, capsys, "trian")
    assert status == 2
    assert err == f"styleloom: no command 'trian'. There are: {', '.join(cli.COMMANDS)}.\n"
    status, out, _ = command(monkeypatch, capsys, "train", "--help")
    assert status == 0
    assert "styleloom train PRESET" in out


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("mend it so"), 1, "styleloom train: mend it so\n"),
        (OSError(28, "No space left on device", "/x"), 1, "No space left on device: /x (free some space"),
        (PermissionError(13, "Permission denied", "/x"), 1, "styleloom train: Permission denied: /x\n"),
        (KeyboardInterrupt(), 130, "\nstyleloom train: interrupted.\n"),
    ],
)
def test_how_errors_end(error, status, said, capsys, monkeypatch):
    def fail(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(fail, "train", [])
    assert stop.value.code == status
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    monkeypatch.setenv("STYLELOOM_TRACEBACK", "1")
    if isinstance(error, Exception):
        with pytest.raises(SystemExit):
            cli.run(fail, "train", [])
        assert "Traceback" in capsys.readouterr().err


def test_our_own_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda args: 1 // 0, "train", [])


def test_out_of_memory_ends_in_two_lines(refused):
    def greedy(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it.")

    assert "--passes" in refused(greedy)


def test_any_other_runtime_error_keeps_its_traceback():
    def broken(_):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        cli.run(broken, "train", [])


# Other sizes than the data set's


def test_reduced(arguments, call, refused, unlabelled, out):
    assert call(train.main, *arguments(unlabelled, out, "--data.reduce=2"))[0] == 0
    about = json.loads(next((out / "snapshots").glob("*/snapshot.json")).read_text())
    assert (about["width"], about["height"]) == (8, 8)
    complaint = refused(train.main, *arguments(unlabelled, out, "--data.reduce=1"))
    assert "data.reduce: 2 -> 1" in complaint
    assert "16x16 cannot be reduced 3 times" in refused(train.main, *arguments(unlabelled, out, "--data.reduce=3"))


def test_the_smaller_set_is_taken_where_it_was_prepared(settings, pictures, tmp_path):
    source = open_source(pictures, "none")
    prepare(source, tmp_path / "data", width=32, height=32, reduced=[(16, 16)], progress=False)
    training = Training(settings(tmp_path / "data", "", "--data.reduce=2"), Team())
    assert (training.width, training.height, training.data[0].reduce) == (16, 16, 1)
    assert training.manifest == read_manifest(tmp_path / "data" / "16x16")
    images, _ = next(training.stream())
    assert images.shape[2:] == (16, 16)
    whole = Training(settings(tmp_path / "data", "", "--data.reduce=4"), Team())
    assert (whole.width, whole.data[0].reduce, whole.manifest.width) == (8, 4, 32)


def test_the_gpu_decoder_needs_a_gpu(arguments, refused, unlabelled, out):
    assert "needs a CUDA device" in refused(train.main, *arguments(unlabelled, out, "--data.decoder=gpu"))
    assert not out.exists()


def test_a_killed_reader_ends_in_a_line(arguments, python, unlabelled, out):
    process = python(
        "-m", "styleloom.scripts.train", *arguments(unlabelled, out, "--total-kimg=99", "--data.workers=1")
    )
    give_up = time.monotonic() + 120
    while not (out / "checkpoints").exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    (reader,) = psutil.Process(process.pid).children()
    reader.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "a process that reads data was killed" in err
    assert len(err.strip().splitlines()) <= 2
