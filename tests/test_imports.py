"""Who may import whom: scripts -> training -> {ops, datasets}, and inside training the narrow rules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("training", "ops", "datasets", "scripts") for p in (ROOT / folder).rglob("*.py"))

# What a file (or folder) of training may import of ours, where that is less than everything below it.
NARROW = {
    "training/losses.py": set(),
    "training/ema.py": set(),
    "training/report.py": set(),
    "training/draws.py": set(),
    "training/phema.py": set(),
    "training/augment.py": {"ops", "training.draws"},
    "training/distributed.py": {"training.watchdog"},
    "training/watchdog.py": set(),
    "training/agreement.py": set(),
    "training/unpickle.py": set(),
    "training/published.py": {"training.unpickle"},
    "training/export.py": {"training.draws", "training.networks"},
    "training/metrics/swd.py": set(),
    "training/metrics/distances.py": set(),
    "training/metrics/features.py": {"datasets.cache"},
    "training/metrics/store.py": {"datasets.manifest"},
    "training/saver.py": {"training.checkpoint"},
    "training/health.py": {"datasets", "training.checkpoint", "training.distributed"},
    "training/networks/layers.py": {"ops"},
    **{
        f"training/networks/{name}.py": {"ops", "training.networks"}
        for name in ("growing", "stylegan2", "progressive", "stylegan1", "msg")
    },
    "training/phases.py": {"training.distributed", "training.draws", "training.report"},
}
SEES_RUN = {
    "config", "schedule", "networks/__init__", "checkpoint", "loop", "trainer", "dryrun", "data", "initialise",
    "official",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names below `styleloom` that a file imports."""
    package = path.relative_to(ROOT).parent.as_posix().split("/")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["styleloom", *package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("styleloom.") for name in names if name.startswith("styleloom.")}


def allowed(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_layers(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    folder = name.split("/")[0]
    below = {"ops": {"ops"}, "datasets": {"datasets"}, "training": {"training", "ops", "datasets"}}
    permitted = NARROW.get(name, below.get(folder, {"training", "ops", "datasets", "scripts"}))
    wrong = {i for i in imports(path) if not allowed(i, permitted)}
    assert not wrong, f"{name} imports {wrong}"


def test_only_those_who_choose_see_the_run() -> None:
    for path in FILES:
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        if name.startswith("training/") and not name.startswith("training/recipes/"):
            sees = any(allowed(i, {"training.config"}) for i in imports(path))
            assert not sees or name.removeprefix("training/") in SEES_RUN, name


def test_only_distributed_imports_accelerate_or_deepspeed() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            )
            if any(n.split(".")[0] in ("accelerate", "deepspeed") for n in names):
                assert path.name == "distributed.py", path


def test_relative_imports_inside_absolute_outside() -> None:
    for path in FILES:
        inside = path.relative_to(ROOT).parts[0] != "scripts"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                ours = node.level > 0 or (node.module or "").startswith("styleloom")
                assert not ours or (node.level > 0) == inside, f"{path}: {ast.unparse(node)}"
