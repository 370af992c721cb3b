"""The folders' unusual mapping: what is in the wheel, and that nothing of ours shadows a library."""

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["training", "ops", "datasets", "scripts"]


def test_datasets_and_tests_are_not_regular_packages() -> None:
    # The -m launchers put the repository root on sys.path: with an __init__.py, our `datasets` would shadow
    # HuggingFace's, and Accelerate fails on two or more processes.
    assert not (ROOT / "datasets" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_a_library_called_datasets_wins_over_our_folder(tmp_path: Path) -> None:
    library = tmp_path / "datasets"
    library.mkdir()
    (library / "__init__.py").write_text("who = 'library'\n")
    code = "import sys, datasets; assert sys.path[0] == ''; print(datasets.who)"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "library", out.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split("\n"):
        if name and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(target), "."],
        cwd=source,
        check=True,
    )
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_source_file_and_nothing_else(wheel: set[str]) -> None:
    sources = {
        "styleloom/" + p.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    packed = {name for name in wheel if ".dist-info/" not in name}
    assert packed == sources


def test_wheel_has_licence_and_entry_point(wheel: set[str]) -> None:
    assert any(name.endswith("LICENSE") for name in wheel)
    assert any(name.endswith("entry_points.txt") for name in wheel)


def test_every_command_is_a_module_with_main(capsys: pytest.CaptureFixture[str]) -> None:
    from styleloom.scripts.cli import COMMANDS, run

    for name in COMMANDS:
        module = importlib.import_module(f"styleloom.scripts.{name}")
        with pytest.raises(SystemExit) as stop:
            run(module.main, name, ["--help"])
        assert not stop.value.code
        assert f"styleloom {name}" in capsys.readouterr().out
        last = Path(module.__file__ or "").read_text().rstrip().splitlines()[-2:]
        assert last == ['if __name__ == "__main__":', f'    run(main, "{name}")']
    out = subprocess.run(
        [sys.executable, "-m", "styleloom.scripts.inspect", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "styleloom inspect" in out.stdout
