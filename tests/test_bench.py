"""scripts/bench*.py: what is measured, counted and shown. Never how long anything takes."""

import json
import math
import subprocess
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from styleloom.ops import build
from styleloom.scripts import bench, bench_model, bench_ops
from styleloom.scripts.bench_ops import Case

CPU = torch.device("cpu")
TINY = ["--resolution", "8", "--channel-base", "64", "--mapping-layers", "1", "--rounds", "1", "--device", "cpu"]
OURS = build.path("cpu")
KEYS = {"op", "shape", "dtype", "layout", "path", "pass", "seconds", "speedup"}
BYTES = {"bytes", "gb_per_s", "copy_seconds", "times_copy", "copy_share"}
FLOPS = {"flops", "flop_per_s", "matrix_share"}


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> Iterator[None]:
    """Ceilings of small tensors, and this process's allocator as it is."""
    monkeypatch.setattr(bench_ops, "COPIES", [2**12])
    monkeypatch.setattr(bench_ops, "ROUNDS", (1, 1))
    monkeypatch.setattr(bench_ops, "SHORTEST", 0.0)
    monkeypatch.setattr(bench_ops, "TARGETS", [(2, 16, 8, 8)])
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(case: Case, dtype: str = "fp32") -> list[dict]:
    return [row for rows in bench_ops.measure([case], [dtype], CPU, {dtype: 1e9}, 0.0) for row in rows]


def sound(value) -> bool:
    return math.isfinite(value) and value > 0


# Ops.


@pytest.mark.parametrize("op", [*bench_ops.RESAMPLING, *bench_ops.POINTWISE, *bench_ops.CONVOLUTIONS])
def test_rows_have_each_path_pass_and_layout(op):
    rows = rows_of(Case(op, (2, 16, 8, 8), 16))
    paths = {"plain", *(["torch"] if op in bench_ops.RESAMPLING else []), *([] if OURS == "reference" else [OURS])}
    assert {(row["path"], row["pass"], row["layout"]) for row in rows} == {
        (path, name, layout) for path in paths for name in bench_ops.PASSES for layout in bench_ops.LAYOUTS
    }
    for row in rows:
        assert set(row) == KEYS | (FLOPS if op in bench_ops.CONVOLUTIONS else BYTES)
        assert all(sound(value) for value in row.values() if isinstance(value, float | int))


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        # Of an input of 2 * 16 * 8 * 8 = 2048 elements: those read and written.
        ("upfirdn2d up2", 2048 + 8192, 8192 + 2048),
        ("upfirdn2d down2", 2048 + 512, 512 + 2048),
        ("upfirdn2d blur", 2048 + 2048, 2048 + 2048),
        ("bias_act", 2048 + 2048, 3 * 2048),  # dy, y, dx
        ("bias_act layer", 2048 + 2048, 4 * 2048),  # dy, x, y, dx
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_bytes_are_what_has_to_move(op, forward, backward, dtype, size):
    for row in rows_of(Case(op, (2, 16, 8, 8)), dtype):
        elements = {"forward": forward, "backward": backward, "both": forward + backward}[row["pass"]]
        assert row["bytes"] == elements * size
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["times_copy"] * row["copy_share"] == pytest.approx(1)


def test_a_copy_moves_the_bytes_it_is_asked_for():
    run = bench_ops.copy([64, 32], torch.float32, CPU)
    moved = run.__closure__[0].cell_contents  # type: ignore[index]
    assert [sum(t.numel() * t.element_size() for t in pair) for pair in moved] == [64, 32]


@pytest.mark.parametrize(
    ("op", "convolution", "filtered"),
    [
        # 2 FLOPs a multiplication; places, channels and taps of the convolution; elements that the filter writes.
        ("conv2d", 2 * 2 * 64 * 16 * 8 * 9, 0),
        ("conv2d up", 2 * 2 * 64 * 16 * 8 * 9, 2 * 8 * 16 * 16),
        ("conv2d down", 2 * 2 * 16 * 16 * 8 * 9, 2 * 16 * 9 * 9),
    ],
)
def test_flops_of_a_convolution(op, convolution, filtered):
    for row in rows_of(Case(op, (2, 16, 8, 8), 8)):
        # The gradients of x and of the weights take as much each; the filter's only gradient is that of its input.
        expected = {"forward": convolution + 32 * filtered, "backward": 2 * convolution + 32 * filtered}
        assert row["flops"] == sum(expected[part] for part in bench_ops.parts(row["pass"]))
        assert row["matrix_share"] == pytest.approx(row["flops"] / row["seconds"] / 1e9)


def test_flops_of_a_network_and_of_a_gradients_gradient():
    w, v = torch.randn(8, 4, 3, 3, requires_grad=True), torch.randn(1, 8 * 6 * 6, requires_grad=True)

    def first() -> torch.Tensor:
        return F.conv2d(torch.zeros(2, 4, 6, 6).requires_grad_(), w, padding=1).flatten(1) @ v.t()

    def second() -> tuple[torch.Tensor, ...]:
        x = torch.zeros(2, 4, 6, 6).requires_grad_()
        y = F.conv2d(x, w, padding=1).flatten(1) @ v.t()
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [w, v])

    convolution, dense = 2 * 2 * 36 * 4 * 8 * 9, 2 * 2 * 288
    assert bench_ops.counted(first) == convolution + dense
    # Forward; the gradient of x; that one's gradient by the weights, which passes through the convolution to `v`.
    assert bench_ops.counted(second) == (1 + 1 + 2) * convolution + (1 + 1 + 1) * dense


def test_plain_is_plain_and_leaves_the_mode_as_it_was(monkeypatch):
    for before in ("auto", None):
        monkeypatch.setenv("STYLELOOM_OPS", before) if before else monkeypatch.delenv("STYLELOOM_OPS")
        assert bench_ops.plainly(lambda: torch.tensor(build.path("cpu") == "reference"))()
        with pytest.raises(KeyError), bench_ops.plain():
            raise KeyError
        assert build.os.environ.get("STYLELOOM_OPS") == before


def test_paths_agree():
    for op in (*bench_ops.RESAMPLING, *bench_ops.POINTWISE, *bench_ops.CONVOLUTIONS):
        its = bench_ops.prepare(Case(op, (2, 16, 8, 8), 16), torch.float32, torch.channels_last, CPU)
        expected = its.paths["plain"]()
        for path in its.paths.values():
            torch.testing.assert_close(path(), expected, atol=1e-4, rtol=1e-4)


def test_cases_are_stylegan2s_shapes():
    found = bench_ops.cases([256, 1024], batch=4)
    assert len(found) == len(set(found))
    assert Case("upfirdn2d up2", (4, 64, 128, 128)) in found
    assert Case("bias_act layer", (4, 64, 256, 256)) in found
    assert Case("conv2d up", (4, 128, 128, 128), 64) in found
    assert Case("conv2d down", (1, 32, 1024, 1024), 64) in found
    assert {case.shape for case in bench_ops.cases([], batch=1)} == {(2, 16, 8, 8)}


def test_ops_prints_a_table(call, tmp_path):
    file = tmp_path / "ops.json"
    status, out, _ = call(
        bench.main, "ops", "--resolutions", 8, "--batch", 1, "--dtypes", "fp32", "--threads", 1, "--json", file
    )
    assert status == 0
    machine, ceiling, empty, titles, *lines = out.splitlines()
    assert f"torch {torch.__version__}" in machine
    assert "freed memory not kept" in machine
    assert "GB/s" in ceiling
    assert empty == ""
    assert " ".join(titles.split()) == (
        "op shape dtype layout pass path ms GB/s of copy x copy GFLOP/s of matrix x plain"
    )
    found = json.loads(file.read_text())
    assert set(found) == {"machine", "ceiling", "rows"}
    assert len(lines) == len(found["rows"])
    assert {len(line) for line in lines} == {len(titles)}
    assert found["machine"]["threads"] == 1
    assert found["machine"]["ops"] == OURS
    assert set(found["ceiling"]["matrix"]) == {"fp32"}
    assert all(sound(each["gb_per_s"]) and each["bytes"] == 2**12 for each in found["ceiling"]["copy"])


def test_quick_measures_the_targets(call):
    status, out, _ = call(bench.main, "ops", "--quick", "--dtypes", "fp32", "--device", "cpu", "--json", "-")
    assert status == 0
    rows = json.loads(out)["rows"]
    assert {row["op"] for row in rows} == {*bench_ops.RESAMPLING, *bench_ops.POINTWISE}
    assert {tuple(row["shape"]) for row in rows} == {(2, 16, 8, 8)}


# Models.


def test_one_model(call):
    status, out, _ = call(bench.main, "model", *TINY, "--json", "-")
    assert status == 0
    found = json.loads(out)
    rows = found["rows"]
    assert [row["phase"] for row in rows] == ["Gmain", "Gpl", "Dmain", "Dr1", "iteration"]
    assert [row["images"] for row in rows] == [4, 2, 4, 4, 4]
    *phases, iteration = rows
    for row in rows:
        assert (row["resolution"], row["precision"]) == (8, "fp32")
        assert all(sound(row[key]) for key in ("seconds", "cpu_seconds", "flops", "img_per_s", "img_per_cpu_s"))
        assert row["img_per_s"] == pytest.approx(row["images"] / row["seconds"])
        assert row["matrix_share"] == pytest.approx(row["flop_per_s"] / found["ceiling"]["matrix"]["fp32"])
    for key in ("seconds", "cpu_seconds", "flops"):
        assert iteration[key] == pytest.approx(sum(row[key] / row["interval"] for row in phases))
    assert [row["interval"] for row in phases] == [1, 4, 1, 16]
    assert iteration["peak_bytes"] >= 0
    assert found["settings"]["network"]["channel_base"] == 64


@pytest.mark.parametrize("preset", ["progressive-1024", "progressive-cpu", "stylegan1-1024", "msg-256"])
def test_other_kinds_at_their_full_size(call, preset):
    """What grows does not here; phases are those of the recipe."""
    arguments = ["--resolution", 8, "--channel-base", 64, "--batch", 8, "--precision", "fp32", *TINY[-4:]]
    status, out, err = call(bench.main, "model", "--preset", preset, *arguments, "--json", "-")
    assert status == 0, err
    found = json.loads(out)
    phases = ["Gmain", "Gpl", "Dmain", "Dr1"] if preset == "msg-256" else ["Dmain", "Gmain"]
    assert [row["phase"] for row in found["rows"]] == [*phases, "iteration"]
    assert {row["resolution"] for row in found["rows"]} == {8}
    assert found["settings"]["growth"]["start"] == 0


def test_flops_are_those_of_the_plain_formulation_and_in_proportion_to_the_batch():
    def count(batch: int) -> dict[str, int]:
        ((size, its),) = bench.read_runs(bench.Model(resolution=(16,), channel_base=128, batch=batch))
        recipe = bench_model.recipes.build(its, size, size, 3, [], CPU)
        return {phase.name: bench_model.count(phase, recipe) for phase in recipe.phases}

    small, large = count(4), count(8)
    for name in ("Gmain", "Dmain", "Dr1"):
        assert large[name] == pytest.approx(2 * small[name], rel=0.01)
    assert small["Dr1"] > 0


def test_compares_with_plain_in_turns(call, monkeypatch):
    commands = []

    def children(some, repeats):
        commands.append((some, repeats))
        for _ in range(repeats):
            for key in some:
                yield key, measured(key)

    def measured(key):
        size, precision, way = key
        rows = [
            {"phase": "Gmain", "images": 4, "interval": 1, "seconds": 2.0, "cpu_seconds": 2.0, "flops": 10},
            {"phase": "iteration", "images": 4},
        ]
        for row in rows:
            row |= {"resolution": size, "precision": precision, "formulation": way, "peak_bytes": 2**20}
        rows[0]["cpu_seconds"] = {"ours": 1.0, "plain": 2.0}.get(way, 3.0)
        facts = {"cpu": "CPU", "cores": 2, "threads": 1, "gpu": None, "torch": "2", "ops": "cpu", "memory_kept": True}
        ceiling = {"copy": [], "matrix": {precision: 10.0}}
        return {"machine": facts, "ceiling": ceiling, "rows": bench_model.rates(rows, 10.0)}

    monkeypatch.setattr(bench_model, "in_children", children)
    monkeypatch.setattr(build, "path", lambda device: "cpu")
    status, out, _ = call(bench.main, "model", *TINY, "--precision", "fp32", "bf16", "--compare", "plain")
    assert status == 0
    assert "8 px fp32: 4 img a CPU-second, 2.00 times plain, 3.00 times plain, memory not kept" in out
    assert "8 px bf16: 4 img a CPU-second" in out
    some, repeats = commands[0]
    assert (len(commands), repeats) == (2, 2)
    assert [way for _, _, way in some] == ["ours", "plain", "plain, memory not kept"]
    assert [environment for _, environment in some.values()] == [{}, *[{"STYLELOOM_OPS": "reference"}] * 2]
    assert [arguments[-1] for arguments, _ in some.values()] == ["kept", "kept", "default"]
    assert "px  precision  formulation" in out


def test_a_child_measures_what_it_is_told():
    options = bench.parse(bench.Commands, ["model", *TINY], "bench")
    ((size, its),) = bench.read_runs(options)
    arguments = bench._arguments(options, size, its, CPU, "default")
    commands = {(8, "fp32", "plain"): (arguments, {"STYLELOOM_OPS": "reference"})}
    ((key, found),) = bench_model.in_children(commands, 1)
    assert key == (8, "fp32", "plain")
    assert {row["formulation"] for row in found["rows"]} == {"plain, memory not kept"}
    assert found["settings"] == its.model_dump(mode="json")
    assert found["rows"][-1]["peak_bytes"] > 0


@pytest.mark.parametrize(("said", "quoted"), [("warning\nno preset\n", "no preset"), ("", "ended with status -9")])
def test_a_child_that_fails_is_quoted(monkeypatch, said, quoted):
    failed = subprocess.CompletedProcess([], -9, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ValueError, match=f"8 fp32: {quoted}"):
        list(bench_model.in_children({(8, "fp32"): ([], {})}, 1))


def test_best_of_takes_the_fastest_runs():
    one = {
        "phase": "Gmain",
        "images": 4,
        "interval": 2,
        "seconds": 2.0,
        "cpu_seconds": 1.0,
        "flops": 8,
        "peak_bytes": 5,
    }
    whole = {"phase": "iteration", "images": 4, "peak_bytes": 5}
    two = one | {"seconds": 1.0, "cpu_seconds": 3.0, "peak_bytes": 7}
    best, iteration = bench_model.best_of([bench_model.rates([row, whole], 4.0) for row in (one, two)], 4.0)
    assert (best["seconds"], best["cpu_seconds"], best["peak_bytes"]) == (1.0, 1.0, 7)
    assert (iteration["seconds"], iteration["cpu_seconds"], iteration["flops"]) == (0.5, 0.5, 4)
    assert (iteration["img_per_s"], iteration["flop_per_s"], iteration["matrix_share"]) == (8, 8, 2)


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "bench"),
        (["ops", "--dtypes", "fp64"], "fp64"),
        (["ops", "--resolutions", "100"], "100 px"),
        (["ops", "--threads", "-1"], "--threads"),
        (["ops", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["model", "--preset", "stylegan3"], "no preset 'stylegan3'; there are stylegan2-cpu"),
        (["model", "--preset", "stylegan2-cpu"], "give --resolution"),
        (["model", "--resolution", "99"], "99x99 px"),
        (["model", "--batch", "6"], "minibatch-std"),
        (["model", "--rounds", "0"], "--rounds"),
        (["model", "--threads", "-1"], "--threads"),
        (["model", "--preset", "progressive-1024", "--mapping-layers", "2"], "--mapping-layers: networks of kind pro"),
    ],
)
def test_mistakes(refused, arguments, what):
    assert what in refused(bench.main, *arguments)


@pytest.mark.parametrize("command", ["ops", "model"])
def test_no_gpu(refused, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in refused(bench.main, command, "--device", "cuda")


def test_nothing_to_compare(refused, monkeypatch):
    monkeypatch.setenv("STYLELOOM_OPS", "reference")
    assert "all there is" in refused(bench.main, "model", *TINY, "--compare", "plain")
