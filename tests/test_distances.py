"""training/metrics/distances.py: against clean-fid, against the definitions by brute force, and where the answer is
known."""

import inspect

import numpy as np
import pytest
import torch

from styleloom.training.metrics import distances
from styleloom.training.metrics.distances import frechet, inception_score, kid, moments, precision_recall


def features(n, width=12, seed=0, shift=0.0):
    """fp32 [n, width], none below 0, as a ReLU leaves them, and far from independent."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width))
    return np.maximum(rng.standard_normal((n, width)) @ mixing + shift, 0).astype(np.float32)


@pytest.fixture(scope="module")
def clean_fid():
    fid = pytest.importorskip("cleanfid.fid")
    if "disp" not in inspect.signature(fid.linalg.sqrtm).parameters:
        pytest.skip("this clean-fid does not go with this SciPy: it needs scipy<1.18")
    return fid


def fid_of(a, b):
    return frechet(*moments(a), *moments(b))


def test_moments(monkeypatch):
    monkeypatch.setattr(distances, "ROWS", 16)
    x = features(50)
    mean, covariance = moments(x)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("n", "m", "width"), [(400, 300, 12), (20, 30, 64), (400, 30, 64)])
def test_fid_is_clean_fids(clean_fid, n, m, width):
    a, b = features(n, width, 1), features(m, width, 2, shift=0.5)
    assert fid_of(a, b) == pytest.approx(clean_fid.fid_from_feats(a, b), abs=1e-3)
    assert fid_of(a, b) > 1


def test_the_distance_of_independent_normals_is_known():
    """Sum of (mu1 - mu2)^2 + (sigma1 - sigma2)^2, also where a direction is empty."""
    first, second = np.array([1.0, 4, 9, 0]), np.array([4.0, 4, 0, 0])
    found = frechet(np.array([1.0, 0, 0, 0]), np.diag(first), np.array([0.0, 2, 0, 0]), np.diag(second))
    assert found == pytest.approx(5 + 1 + 0 + 9)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    turned = [turn @ np.diag(x) @ turn.T for x in (first, second)]
    assert frechet(np.zeros(4), turned[0], np.zeros(4), turned[1]) == pytest.approx(10)


@pytest.mark.parametrize("n", [200, 8])
def test_a_set_is_at_no_distance_from_itself(n):
    x, y = features(n), features(n, seed=1)
    assert fid_of(x, x) == pytest.approx(0, abs=1e-9)
    assert fid_of(x, y) == pytest.approx(fid_of(y, x), abs=1e-9)
    assert fid_of(x, y) > 1e-2


def test_two_sets_without_any_variance():
    assert fid_of(np.zeros([5, 3], np.float32), np.ones([4, 3], np.float32)) == pytest.approx(3)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images"):
        moments(features(1))


@pytest.mark.parametrize(("n", "m"), [(60, 40), (30, 1100)])
def test_kid_is_clean_fids_under_the_same_seed(clean_fid, n, m):
    a, b = features(n), features(m, seed=1, shift=0.3)
    np.random.seed(7)
    expected = clean_fid.kernel_distance(a, b)
    assert kid(a, b, seed=7) == pytest.approx(expected, rel=1e-6)
    assert kid(a, b, seed=8) != kid(a, b, seed=7)


def test_kid_leaves_numpys_generator_alone():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    kid(features(20), features(20, seed=1))
    assert np.random.random() == expected


def test_kid_of_few_images_is_the_unbiased_estimate_from_all():
    """As many on either side: every subset is the whole."""
    x, y = features(9).astype(float), features(9, seed=1).astype(float)

    def k(a, b):
        return (a @ b / 12 + 1) ** 3

    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 72
    across = sum(k(x[i], y[j]) for i, j in pairs) / 81
    assert kid(x, y) == pytest.approx(within - 2 * across)


def test_kid_needs_two_images():
    with pytest.raises(ValueError, match="at least 2 images"):
        kid(features(9), features(1))


def test_inception_score_by_its_definition():
    p = np.random.default_rng(0).dirichlet(np.full(7, 0.3), size=23)
    scores = []
    for part in (p[:7], p[7:15], p[15:]):  # i * 23 // 3
        q = part.mean(axis=0)
        scores.append(np.exp(np.mean([sum(a * np.log(a / b) for a, b in zip(row, q, strict=True)) for row in part])))
    assert inception_score(p, splits=3) == pytest.approx((np.mean(scores), np.std(scores)))


def test_inception_score_where_it_is_known():
    assert inception_score(np.full([20, 5], 0.2)) == pytest.approx((1, 0))
    sure = np.tile(np.eye(4), (10, 1))  # four classes, in every part alike; probabilities that are 0
    assert inception_score(sure) == pytest.approx((4, 0))
    assert inception_score(np.repeat(np.eye(4)[:1], 20, axis=0)) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="10 parts"):
        inception_score(np.full([9, 5], 0.2))


def by_brute_force(reals, fakes, k):
    def inside(points, manifold):
        count = 0
        for p in points:
            for i, centre in enumerate(manifold):
                others = sorted(np.linalg.norm(centre - x) for j, x in enumerate(manifold) if j != i)
                if np.linalg.norm(p - centre) <= others[k - 1]:
                    count += 1
                    break
        return count / len(points)

    return inside(fakes, reals), inside(reals, fakes)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows", [8, 1024])
def test_precision_and_recall_by_brute_force(monkeypatch, rows, k):
    monkeypatch.setattr(distances, "ROWS", rows)
    a, b = features(37, 5), features(29, 5, seed=1, shift=1.0)
    a += 1000  # features far from 0, near one another
    b += 1000
    expected = by_brute_force(a.astype(float), b.astype(float), k)
    assert precision_recall(a, b, k) == pytest.approx(expected)
    assert 0.05 < min(expected) < 0.95
    assert expected[0] != expected[1]


def test_precision_and_recall_where_they_are_known():
    a = features(40)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 1000) == (0, 0)
    collapsed = np.repeat(a[:1], 40, axis=0)  # good, and always the same
    precision, recall = precision_recall(a, collapsed)
    assert precision == 1
    assert recall <= 1 / 40
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(a, a[:3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_precision_and_recall_on_a_gpu():
    a, b = features(300, 40), features(200, 40, seed=1)
    assert precision_recall(a, b, device="cuda") == pytest.approx(precision_recall(a, b), abs=0.02)
