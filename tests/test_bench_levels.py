"""scripts/bench_levels.py: sizes and stages of networks that grow, sums over a schedule. Never how long any takes."""

import json
import math

import pytest
import torch

from styleloom.scripts import bench, bench_levels, bench_model, bench_ops
from styleloom.scripts.bench_levels import Levels, row_of, spans, summary
from styleloom.training import recipes, schedule
from styleloom.training.config import PRESETS

CPU = torch.device("cpu")
TINY = ["--resolution", "16", "--channel-base", "64", "--rounds", "1", "--device", "cpu", "--levels"]
ROW = {
    "px", "resolution", "fading", "batch", "kimg", "seconds", "cpu_seconds", "flops", "peak_bytes", "img_per_s",
    "img_per_cpu_s", "flop_per_s", "matrix_share", "sec_per_kimg", "change_seconds", "change_share", "phases",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Ceilings of small tensors, and this process's allocator as it is."""
    monkeypatch.setattr(bench_ops, "COPIES", [2**12])
    monkeypatch.setattr(bench_ops, "ROUNDS", (1, 1))
    monkeypatch.setattr(bench_ops, "SHORTEST", 0.0)
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: False)


def options_of(*more) -> bench.Model:
    return bench.parse(bench.Commands, ["model", *map(str, [*TINY, *more])], "bench")


def run_of(*more):
    return bench.read_runs(options_of(*more))[0][1]


def test_one_size_has_a_row_where_it_fades_in_and_one_where_it_is_whole(call):
    status, out, err = call(bench.main, "model", "--preset", "stylegan1-1024", *TINY, "--sizes", 16, "--batch", 4,
                            "--mapping-layers", 1, "--json", "-")  # fmt: skip
    assert status == 0, err
    found = json.loads(out)
    assert "summary" not in found
    assert [(row["px"], row["resolution"], row["fading"]) for row in found["rows"]] == [(16, 16, True), (16, 16, False)]
    assert [row["kimg"] for row in found["rows"]] == [pytest.approx(600, rel=1e-4), pytest.approx(23800, rel=1e-4)]
    for row in found["rows"]:
        assert set(row) == ROW
        assert row["batch"] == 4
        assert [phase["phase"] for phase in row["phases"]] == ["Dmain", "Gmain"]
        assert row["seconds"] == pytest.approx(sum(phase["seconds"] for phase in row["phases"]))
        assert row["sec_per_kimg"] == pytest.approx(1000 * row["seconds"] / 4)
        assert row["img_per_s"] == pytest.approx(4 / row["seconds"])
        assert row["change_share"] == pytest.approx(row["change_seconds"] / row["seconds"])


def test_the_first_size_is_not_entered_and_its_batch_is_the_schedules(call):
    status, out, err = call(bench.main, "model", "--preset", "progressive-cpu", *TINY, "--sizes", 4, "--json", "-")
    assert status == 0, err
    (row,) = json.loads(out)["rows"]
    batch = schedule.stage(PRESETS["progressive-cpu"], 3, 0).batch
    assert (row["px"], row["fading"], row["batch"], row["resolution"]) == (4, False, batch, 4)
    assert row["change_seconds"] is row["change_share"] is None
    assert math.isfinite(row["matrix_share"])


def test_lazy_phases_are_averaged_in(call):
    """A StyleGAN2 that grows from 8 px."""
    status, out, err = call(bench.main, "model", *TINY, "--mapping-layers", 1, "--start", 8, "--sizes", 16)
    assert status == 0, err
    assert "Gpl/4 " in out
    assert "Dr1/16 " in out
    assert "times as long" not in out


def test_all_sizes_are_measured_in_children_and_summed_up(call, monkeypatch):
    commands = []

    def children(some, repeats):
        commands.append(some)
        for px, _ in some:
            rows = [row(px, True, 2.0), row(px, False, 1.0)]
            yield (px, "px"), {"machine": FACTS, "ceiling": CEILING, "settings": settings, "rows": rows[px == 4 :]}

    def row(px, fading, seconds):
        whole = {"phase": "iteration", "images": 4, "seconds": seconds, "img_per_s": 4.0, "peak_bytes": 2**30}
        stage = schedule.Stage(px.bit_length() - 3, fading, 4, 0.001)
        return row_of(stage, px, 10.0, [{"phase": "G", "interval": 1, "seconds": seconds}, whole], 1.5 * seconds)

    monkeypatch.setattr(bench_model, "in_children", children)
    settings = run_of("--preset", "progressive-1024").model_dump()
    more = ["--preset", "progressive-1024", "--batch", 4, "--kimg", 50]
    status, out, err = call(bench.main, "model", *TINY, *more)
    assert status == 0, err
    assert list(commands[0]) == [(4, "px"), (8, "px"), (16, "px")]
    for (px, _), (arguments, environment) in commands[0].items():
        assert arguments[-6:] == ["--start", "4", "--kimg", "50.0", "--sizes", str(px)]
        assert arguments[arguments.index("--batch") + 1] == "4"
        assert environment == {}
    assert "50 kimg" in out
    assert "--batch: 4 images at every size" in out
    assert "scaled in proportion to the length of 50 kimg" in out
    assert "50%" in out
    # 5 stages of 10 kimg: 3 whole at 250 s/kimg, 2 fading at 500.
    assert f"{(3 * 10 * 250 + 2 * 10 * 500) / 3600:.3g} hours" in out
    assert f"{50 * 250 / 3600:.3g} hours" in out


FACTS = {"cpu": "CPU", "cores": 2, "threads": 1, "gpu": None, "torch": "2", "ops": "cpu", "memory_kept": True}
CEILING = {"copy": [], "matrix": {"fp32": 10.0}}


@pytest.mark.slow
def test_a_child_measures_its_size(call):
    """Two sizes, in real children."""
    more = ["--preset", "progressive-cpu", "--start", 8, "--batch", 4, "--json", "-"]
    status, out, err = call(bench.main, "model", *TINY, *more)
    assert status == 0, err
    found = json.loads(out)
    stages = [(row["px"], row["fading"], row["batch"]) for row in found["rows"]]
    assert stages == [(8, False, 4), (16, True, 4), (16, False, 4)]
    assert found["summary"] == summary(found["rows"])
    assert found["summary"]["kimg"] == pytest.approx(PRESETS["progressive-cpu"].total_kimg)
    assert found["settings"] == run_of(*more[:-2]).model_dump(mode="json")


def test_a_change_is_what_goes_beyond_an_ordinary_iteration():
    phases = [{"phase": "G", "interval": 1, "seconds": 2.0}, {"phase": "R", "interval": 4, "seconds": 4.0}]
    whole = {"phase": "iteration", "images": 8, "seconds": 3.0}
    row = row_of(schedule.Stage(2, True, 8, 0.001), 16, 5.0, [*phases, whole], 7.5)
    assert (row["px"], row["fading"], row["batch"], row["kimg"]) == (16, True, 8, 5)
    assert (row["change_seconds"], row["change_share"]) == (1.5, 0.5)
    assert row["sec_per_kimg"] == 375
    assert row["phases"] == phases


def test_the_summary_is_of_the_schedule_and_of_the_full_size():
    rows = [
        {"kimg": 600, "sec_per_kimg": 1.0, "change_share": None},
        {"kimg": 600, "sec_per_kimg": 3.0, "change_share": 0.2},
        {"kimg": 800, "sec_per_kimg": 6.0, "change_share": 0.1},
    ]
    found = summary(rows)
    assert (found["kimg"], found["largest_change_share"]) == (2000, 0.2)
    assert found["grown_hours"] == pytest.approx(2.0)  # 600 + 1800 + 4800 s
    assert found["full_hours"] == pytest.approx(2000 * 6 / 3600)
    assert found["ratio"] == pytest.approx(12000 / 7200)
    assert summary(rows[:1])["largest_change_share"] is None


def test_spans_are_those_of_the_run():
    run = run_of("--preset", "progressive-1024", "--resolution", 1024, "--batch", 1000)
    found = spans(run, 9)
    assert sum(kimg for _, kimg in found) == pytest.approx(12000)
    assert [stage.px for stage, _ in found] == [4, *(px for px in (8, 16, 32, 64, 128, 256, 512, 1024) for _ in "fw")]
    assert [round(kimg) for _, kimg in found][:3] == [601, 599, 601]  # a stage ends with a batch
    # 8 doublings of 1200 kimg, after which the full size has the rest.
    assert round(found[-1][1]) == 2400
    short = run.model_copy(update={"total_kimg": 1000.0})
    assert [round(kimg) for _, kimg in spans(short, 9)][:4] == [601, 399, 0, 0]


def test_batches_are_those_of_the_schedule_or_the_given_one():
    def batches(*more):
        return [stage.batch for stage, _ in spans(run_of("--preset", "stylegan1-1024", *more), 3)]

    assert batches() == [256, 128, 128]
    assert batches("--batch", 8) == [8, 8, 8]


def test_a_run_of_another_length_has_its_stages_in_proportion():
    run = run_of("--preset", "progressive-1024", "--kimg", 1200)
    assert (run.total_kimg, run.growth.stabilise_kimg, run.growth.fade_kimg) == (1200, 60, 60)
    assert run.growth.start == 4
    assert run_of("--preset", "stylegan2-1024", "--start", 8).growth.start == 8


def test_what_is_entered_is_half_faded_in_and_only_that_is_stepped():
    run = run_of("--preset", "progressive-cpu", "--batch", 4)
    recipe = recipes.build(run, 16, 16, 3, [], CPU)
    steps = bench_model.Steps(recipe, run.seed, bench_model.random_images(recipe, recipe.stage, CPU))
    for stage, _ in spans(run, 3):
        before = {name: x.clone() for name, x in recipe.G.state_dict().items()}
        assert bench_levels.change(steps, stage, CPU) > 0
        assert (recipe.stage, recipe.alpha, recipe.G.level) == (stage, 0.5 if stage.fading else 1, stage.level)
        assert steps.images.shape == (4, 3, stage.px, stage.px)
        moved = {name for name, x in recipe.G.state_dict().items() if not torch.equal(x, before[name])}
        assert moved
        assert moved <= {name for name, _ in recipe.G.active()}


def test_without_levels_nothing_grows():
    options = bench.parse(bench.Commands, ["model", "--preset", "progressive-1024"], "bench")
    ((size, run),) = bench.read_runs(options)
    assert (size, run.growth.start, run.batch) == (1024, 0, 32)
    assert bench_levels.settings(Levels(), run, None, size)["growth"] == run.growth


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([*TINY, "--preset", "stylegan2-256"], "the preset stylegan2-256 does not grow: give --start"),
        ([*TINY, "--preset", "msg-256", "--start", "4"], "msg"),
        ([*TINY, "--start", "5"], "not 5"),
        ([*TINY, "--start", "32"], "growth.start 32 is more than"),
        ([*TINY, "--preset", "progressive-cpu", "--sizes", "32"], "--sizes 32: the run has 4, 8, 16 px"),
        ([*TINY, "--preset", "progressive-cpu", "--batch", "6"], "batch 6"),
        ([*TINY, "--preset", "progressive-cpu", "--kimg", "-1"], "--kimg"),
        ([*TINY, "--preset", "progressive-cpu", "--plan"], "--levels takes one"),
        ([*TINY, "--preset", "progressive-cpu", "--precision", "fp32", "bf16"], "--levels takes one"),
        ([*TINY[:-1], "--start", "4"], "give --levels as well"),
    ],
)
def test_mistakes(refused, arguments, what):
    complaint = refused(bench.main, "model", *arguments)
    assert what in complaint
    assert len(complaint.splitlines()) == 1
