"""training/schedule.py: pure functions of the number of images shown."""

import pytest

from styleloom.training import schedule


@pytest.mark.parametrize(
    ("before", "after", "every", "expected"),
    [
        (0, 15, 16, False),
        (0, 16, 16, True),  # the end belongs to the step
        (16, 31, 16, False),  # its beginning does not
        (15, 17, 16, True),
        (0, 100, 16, True),  # several at once
        (16, 16, 16, False),
        (0, 100, 0, False),  # never
    ],
)
def test_crossed(before, after, every, expected):
    assert schedule.crossed(before, after, every) is expected


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_crossed_fires_once_for_each_multiple_that_a_step_can_reach(batch):
    fired = [n for n in range(0, 3200, batch) if schedule.crossed(n, n + batch, 100)]
    assert len(fired) == (3199 // batch + 1) * batch // 100


def test_due_at_the_first_iteration_and_every_kth_after_it():
    due = [i for i in range(40) if schedule.due(nimg=i * 32, batch=32, interval=16)]
    assert due == [0, 16, 32]
    assert all(schedule.due(i * 32, 32, 1) for i in range(5))


def test_ema_beta_halves_after_the_half_life():
    beta = schedule.ema_beta(nimg=10**9, batch=32, half_life=10_000, ramp=None)
    assert beta ** (10_000 / 32) == pytest.approx(0.5)


def test_ema_beta_ramp_limits_the_half_life_to_a_share_of_the_images_shown():
    assert schedule.ema_beta(20_000, 32, 10_000, 0.05) == 0.5 ** (32 / 1000)
    assert schedule.ema_beta(200_000, 32, 10_000, 0.05) == 0.5 ** (32 / 10_000)
    assert schedule.ema_beta(10**7, 32, 10_000, 0.05) == 0.5 ** (32 / 10_000)


def test_ema_beta_with_ramp_forgets_everything_at_the_start():
    assert schedule.ema_beta(0, 32, 10_000, 0.05) == 0.0
    assert schedule.ema_beta(0, 32, 0.0, None) == 0.0  # a half-life of 0: no averaging


def test_cosine_goes_from_start_to_end_and_stays():
    assert schedule.cosine(2.0, 0.2, 0, 1000) == 2.0
    assert schedule.cosine(2.0, 0.2, 500, 1000) == pytest.approx(1.1)
    assert schedule.cosine(0.0, 1.0, 250, 1000) == pytest.approx((1 - 0.5**0.5) / 2)
    assert schedule.cosine(2.0, 0.2, 1000, 1000) == schedule.cosine(2.0, 0.2, 10**9, 1000) == 0.2
    assert schedule.cosine(2.0, 0.2, 0, 0) == 0.2


def test_ema_beta_warms_up():
    def half_life(nimg):
        return schedule.ema_beta(nimg, 32, 10_000, None, warmup=20_000)

    assert half_life(0) == 0.0
    assert half_life(10_000) == pytest.approx(0.5 ** (32 / 5_000))
    assert half_life(20_000) == half_life(10**9) == 0.5 ** (32 / 10_000)


def test_lazy_regularisation_corrects_adam():
    assert schedule.lazy(0.002, 0.99, [1, 4]) == pytest.approx((0.0016, 0.99199), abs=5e-6)
    lr, beta2 = schedule.lazy(0.002, 0.99, [1, 16])
    assert lr == pytest.approx(0.0018824, abs=5e-8)
    assert beta2 == pytest.approx(0.990586, abs=1e-6)


def test_lazy_without_a_lazy_phase_changes_nothing():
    assert schedule.lazy(0.002, 0.99, [1]) == (0.002, 0.99)
    assert schedule.lazy(0.002, 0.99, [1, 1]) == (0.002, 0.99)
