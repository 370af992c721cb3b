"""training/schedule.py: how networks grow, as functions of the number of images shown."""

import math

import pytest

from styleloom.training import schedule
from styleloom.training.config import PRESETS, Growth, Run
from styleloom.training.schedule import Stage

SIZES = [4, 8, 16, 32, 64, 128, 256, 512, 1024]
# Published for Progressive GAN and StyleGAN; sizes that are not named have the base's batch, and lr 0.001.
BATCHES = {
    1: (4, {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8, 512: 4}),
    2: (8, {4: 256, 8: 256, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8}),
    4: (16, {4: 512, 8: 256, 16: 128, 32: 64, 64: 32, 128: 16}),
    8: (32, {4: 512, 8: 256, 16: 128, 32: 64, 64: 32}),
}
RATES = {
    1: {1024: 0.0015},
    2: {512: 0.0015, 1024: 0.002},
    4: {256: 0.0015, 512: 0.002, 1024: 0.003},
    8: {128: 0.0015, 256: 0.002, 512: 0.003, 1024: 0.003},
}


def growing(start=4, stabilise=10.0, fade=4.0, batch=32, **growth):
    return Run(batch=batch, growth=Growth(start=start, stabilise_kimg=stabilise, fade_kimg=fade, **growth))


@pytest.mark.parametrize("gpus", BATCHES)
def test_the_published_tables(gpus):
    base, batches = BATCHES[gpus]
    for px in SIZES:
        assert schedule.published(gpus, px) == (batches.get(px, base), RATES[gpus].get(px, 0.001))


@pytest.mark.parametrize("gpus", [3, 16, 64, 512])
def test_the_rule_for_other_numbers_of_gpus(gpus):
    for px in SIZES:
        batch, lr = schedule.published(gpus, px)
        assert batch >= 4 * gpus  # work for all
        assert batch >= schedule.published(min(gpus, 8), px)[0] or gpus < 8
        eight = schedule.published(8, px)
        if gpus > 8:
            assert lr == pytest.approx(eight[1] * math.sqrt(batch / eight[0]))
    batches = [schedule.published(gpus, px)[0] for px in SIZES]
    assert batches == sorted(batches, reverse=True)


def test_without_growth_there_is_one_stage():
    run = Run(batch=8)
    only = Stage(4, False, 8, run.recipe.lr)
    for nimg in (0, 1, 10**9):
        assert schedule.stages(run, 5, nimg) == [(nimg, only)]
        assert schedule.alpha(run, 5, nimg) == 1.0
    assert only.px == 64


def test_stages_and_alpha_by_hand():
    run = growing(batch=32, lr=((8, 0.5),))
    lr = run.recipe.lr
    # 10,000 is not a multiple of 32: the first iteration beyond it is the first of the fade.
    assert schedule.stages(run, 3, 0) == [
        (0, Stage(0, False, 32, lr)),
        (10_016, Stage(1, True, 32, 0.5)),
        (14_016, Stage(1, False, 32, 0.5)),
        (24_032, Stage(2, True, 32, lr)),
        (28_000, Stage(2, False, 32, lr)),
    ]
    for nimg, alpha in [
        (0, 1),
        (10_000, 1),
        (10_016, 0.004),
        (12_000, 0.5),
        (13_999, 0.99975),
        (14_000, 1),
        (26_000, 0.5),
    ]:
        assert schedule.alpha(run, 3, nimg) == pytest.approx(alpha)
        assert schedule.stage(run, 3, nimg).fading == (alpha < 1)


def test_the_fade_is_linear():
    run = growing()
    values = [schedule.alpha(run, 9, 14_000 * 3 + 10_000 + shown) for shown in range(1, 4000)]
    assert values == pytest.approx([shown / 4000 for shown in range(1, 4000)])


@pytest.mark.parametrize("levels", [2, 5, 9])
@pytest.mark.parametrize(("stabilise", "fade"), [(10, 4), (0, 4), (4, 0), (0.01, 0.02), (0.5, 0.333)])
def test_stages_are_those_of_each_step_and_from_anywhere(levels, stabilise, fade):
    """`stages` jumps from change to change; walking through all steps finds the same, also when begun on the way."""
    run = growing(stabilise=stabilise, fade=fade, batch=16, gpus=1)
    nimg, walked, seen = 0, [], []
    while not walked or walked[-1][1].level < levels - 1 or walked[-1][1].fading:
        its = schedule.stage(run, levels, nimg)
        if not walked or its != walked[-1][1]:
            walked.append((nimg, its))
        seen.append(nimg)
        nimg += its.batch
    stages = schedule.stages(run, levels, 0)
    assert stages == walked
    for begin in seen[:: max(len(seen) // 20, 1)]:
        rest = schedule.stages(run, levels, begin)
        assert rest[0] == (begin, schedule.stage(run, levels, begin))
        assert rest[1:] == [each for each in stages if each[0] > begin]


def test_a_level_is_never_left_out_of_the_published_schedules():
    for name, start in (("progressive-1024", 4), ("stylegan1-1024", 8)):
        run = PRESETS[name]
        stages = [stage for _, stage in schedule.stages(run, 9, 0)]
        expected = [(px, False) for px in SIZES if px >= start] + [(px, True) for px in SIZES if px > start]
        assert sorted((stage.px, stage.fading) for stage in stages) == sorted(expected)
        assert all(stage.batch == schedule.published(8, stage.px)[0] for stage in stages)
        assert schedule.stages(run, 9, 0)[-1][0] < run.total_kimg * 1000


def test_exceptions_go_before_tables():
    run = growing(gpus=8, batch=8).model_copy(
        update={"growth": Growth(start=4, gpus=8, batch=((16, 48),), lr=((1024, 0.5),))}
    )
    sizes = {stage.px: (stage.batch, stage.lr) for _, stage in schedule.stages(run, 9, 0)}
    assert sizes[16] == (48, 0.001)
    assert sizes[1024] == (32, 0.5)
    assert sizes[8] == (256, 0.001)


def test_a_start_that_is_too_large():
    assert schedule.first_level(growing(start=64), 5) == 4
    with pytest.raises(ValueError, match=r"growth.start 128 is more than the size of the images, which counts as 64"):
        schedule.first_level(growing(start=128), 5)


def test_a_decay_for_each_step_is_taken_as_it_is():
    assert schedule.ema_beta(10**6, 512, 10_000, 0.05, decay=0.999) == 0.999
