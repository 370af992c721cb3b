"""training/report.py: means over ticks and ranks, what is kept of earlier tries, pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from styleloom.training.report import Report, Writer, collect, duration, image_grid, report, strips, to_uint8


def alone(values):
    return values


@pytest.fixture(autouse=True)
def _nothing_reported():
    Report.load_state_dict({})
    yield
    Report.load_state_dict({})


def test_collect_gives_means_over_everything_reported_and_forgets_it():
    report("loss", torch.tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True))
    report("loss", 8.0)
    report("a", torch.tensor([1, 2], dtype=torch.int32))
    assert collect(alone) == {"a": 1.5, "loss": 4.0}
    assert collect(alone) == {}


def test_means_do_not_lose_small_numbers():
    for _ in range(1000):
        report("x", torch.full([1000], 0.1))
    report("x", 1e6)
    assert collect(alone)["x"] == pytest.approx((1e6 * np.float32(0.1) + 1e6) / (1e6 + 1), rel=1e-12)


def test_the_state_counts_sums_and_squares():
    report("x", torch.tensor([1.0, 2.0, 4.0]))
    assert Report.state_dict()["x"].tolist() == [3, 7, 21]
    assert Report.state_dict()["x"].dtype == torch.float64


def test_a_tick_goes_on_from_its_state():
    report("x", torch.tensor([1.0, 2.0]))
    state = {name: x.clone() for name, x in Report.state_dict().items()}
    report("x", 100.0)
    Report.load_state_dict(state)
    report("x", 6.0)
    assert collect(alone) == {"x": 3.0}


def test_merge_brings_all_ranks_together_in_one():
    def two_ranks(values):
        return {name: 2 * x for name, x in values.items()}

    for keep, expected in ((True, [4, 6, 10]), (False, None)):
        Report.load_state_dict({})
        report("x", torch.tensor([1.0, 2.0]))
        Report.merge(two_ranks, keep)
        assert (Report.state_dict()["x"].tolist() if "x" in Report.state_dict() else None) == expected


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_grids_of_all_kinds(channels, mode):
    images = torch.arange(5 * channels * 32 * 64).reshape(5, channels, 32, 64).remainder(251).to(torch.uint8)
    grid = image_grid(images, columns=2)
    assert (grid.mode, grid.size) == (mode, (2 * 64 * 2, 3 * 32 * 2))  # twice as large, so that 64 px is the short side
    pixels = np.asarray(grid).reshape(192, 256, channels)[::2, ::2]
    for i, image in enumerate(images.numpy()):
        row, column = divmod(i, 2)
        cell = pixels[32 * row : 32 * row + 32, 64 * column : 64 * column + 64]
        assert (cell == image.transpose(1, 2, 0)).all()
    assert (pixels[64:, 64:] == 255).all()  # the empty cell


def test_grids_are_square_by_default_and_large_images_stay():
    assert image_grid(np.zeros([10, 3, 128, 64], np.uint8)).size == (4 * 64, 3 * 128)


def test_uint8_rounds_and_clamps():
    values = torch.tensor([-1.0, 1.0, 0.0, -5.0, 5.0, 2 * 100.4 / 255 - 1, 2 * 100.6 / 255 - 1])
    out = to_uint8(values.reshape(1, 1, 1, 7))
    assert out.dtype == torch.uint8
    assert out.flatten().tolist() == [0, 255, 128, 0, 255, 100, 101]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)  # the reverse of what training does to the reals


def test_writing_on_drops_lines_after_the_checkpoint_and_a_cut_one(tmp_path):
    lines = [json.dumps({"nimg": nimg, "x": 1.5}) + "\n" for nimg in (100, 200, 300)]
    (tmp_path / "stats.jsonl").write_text("".join(lines) + "not json\n" + '[1]\n{"x": 1}\n' + '{"nimg": 150, "x"')
    writer = Writer(tmp_path, 200)
    assert (tmp_path / "stats.jsonl").read_text() == "".join(lines[:2])
    writer.line({"nimg": 260, "x": 2.5})
    writer.close()
    assert [json.loads(line)["nimg"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()] == [100, 200, 260]
    assert list(tmp_path.glob("*.tmp")) == []


def test_tensorboard_has_scalars_and_pictures_without_what_was_undone(tmp_path):
    for start, nimgs in ((0, (100, 200, 300)), (200, (250,))):
        writer = Writer(tmp_path, start)
        for nimg in nimgs:
            writer.line({"nimg": nimg, "loss/G": nimg / 10, "note": "text"})
        writer.picture("fakes-000000100", Image.new("RGBA", (8, 8)), 100)
        writer.close()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["fakes-000000100.png"]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/G")] == [(100, 10), (200, 20), (250, 25)]
    assert events.Tags()["images"] == ["fakes"]
    assert "note" not in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (425, "7m 05s"), (11520, "3h 12m"), (187200, "2d 04h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_statistic_may_come_from_two_devices():
    """A restored tick lies on the CPU, what is reported next on the GPU (here: meta), and the other way round."""
    report("x", torch.ones(2))
    report("x", torch.ones(2, device="meta"))
    assert Report.state_dict()["x"].device.type == "meta"
    Report.load_state_dict({})


def test_strips_are_brought_to_one_height_and_named(tmp_path):
    """Small ones enlarged by whole factors, large ones reduced, whatever their shape or channels."""
    small = np.zeros((4, 16), np.uint8)
    small[:, ::2] = 200
    Image.fromarray(small).save(tmp_path / "a.png")
    large = np.full((512, 1024, 3), 77, np.uint8)
    Image.fromarray(large).save(tmp_path / "b.png")
    sheet = np.asarray(strips([("4 px", tmp_path / "a.png"), ("512 px", tmp_path / "b.png")], cell=128))
    margin = 128 * 2 // 3
    assert sheet.shape == (256, margin + 512, 3)
    assert np.array_equal(sheet[:128, margin:, 0], small.repeat(32, axis=0).repeat(32, axis=1))
    assert (sheet[128:, margin : margin + 256] == 77).all()
    assert (sheet[128:, margin + 256 :] == 255).all()
    for row in (sheet[:128], sheet[128:]):
        assert (row[:, :margin] < 128).any()  # the name
