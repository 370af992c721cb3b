"""training/losses.py: logistic losses by hand, R1 and path length where the answer is known in closed form."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from styleloom.training import losses

LOGITS = torch.tensor([[-2.0], [0.0], [3.0]])


def by_hand(sign):
    return torch.tensor([math.log1p(math.exp(sign * x)) for x in (-2.0, 0.0, 3.0)])


def test_logistic_losses():
    torch.testing.assert_close(losses.logistic_generator(LOGITS), by_hand(-1))
    torch.testing.assert_close(losses.logistic_discriminator_real(LOGITS), by_hand(-1))
    torch.testing.assert_close(losses.logistic_discriminator_fake(LOGITS), by_hand(+1))


def test_logistic_losses_are_finite_for_huge_logits():
    huge = torch.tensor([[-1e4], [1e4]])
    assert torch.equal(losses.logistic_generator(huge), torch.tensor([1e4, 0.0]))
    assert torch.equal(losses.logistic_discriminator_fake(huge), torch.tensor([0.0, 1e4]))


def test_logistic_losses_have_two_derivatives():
    x = LOGITS.double().requires_grad_()
    assert gradgradcheck(losses.logistic_generator, x)
    assert gradgradcheck(losses.logistic_discriminator_fake, x)


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    x = torch.randn(3, 2, 4, 5, requires_grad=True)
    w = torch.randn(2, 4, 5)
    penalty = losses.r1_penalty(x, (x * w).sum(dim=[1, 2, 3])[:, None])
    torch.testing.assert_close(penalty, w.square().sum().expand(3))


def test_r1_of_a_quadratic_discriminator_and_its_gradient():
    x = torch.randn(3, 2, 4, 5, requires_grad=True)
    penalty = losses.r1_penalty(x, (x.square().sum(dim=[1, 2, 3]) / 2)[:, None])
    torch.testing.assert_close(penalty, x.square().sum(dim=[1, 2, 3]))
    (grad,) = torch.autograd.grad(penalty.sum(), x)
    torch.testing.assert_close(grad, 2 * x)


def test_r1_reaches_the_weights_of_the_discriminator():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 2, 2, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda w: losses.r1_penalty(x, (x.flatten(1) @ w).tanh().sum(dim=1, keepdim=True)), w)


def linear_generator(seed=0):
    """ws [N=2, num_ws=3, w_dim=5], A [5, 16], noise [N, 1, 4, 4]."""
    g = torch.Generator().manual_seed(seed)
    ws = torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    A = torch.randn(5, 16, generator=g, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    return ws, A, noise


def images_of(ws, A):
    return (ws.sum(dim=1) @ A).reshape(-1, 1, 4, 4)


def test_path_length_of_a_linear_generator():
    ws, A, noise = linear_generator()
    lengths = losses.path_lengths(images_of(ws, A), ws, noise)
    expected = (A @ noise.flatten(1).T / 4).norm(dim=0)  # |A y| / sqrt(H W), the same at every layer
    torch.testing.assert_close(lengths, expected)


def test_path_length_averages_squares_over_layers():
    ws, A, noise = linear_generator()
    full = losses.path_lengths(images_of(ws, A), ws, noise)
    third = losses.path_lengths((ws[:, 0] @ A).reshape(-1, 1, 4, 4), ws, noise)  # the other two layers do nothing
    torch.testing.assert_close(third, full / 3**0.5)


def test_path_length_reaches_the_weights_of_the_generator():
    ws, A, noise = linear_generator()
    assert gradcheck(lambda A: losses.path_lengths(images_of(ws, A), ws, noise), A)


def test_path_length_penalty():
    penalty = losses.path_length_penalty(torch.tensor([1.0, 4.0]), torch.tensor(3.0))
    assert torch.equal(penalty, torch.tensor([4.0, 1.0]))


def test_wasserstein_losses():
    assert losses.wasserstein_generator(LOGITS).tolist() == [2.0, 0.0, -3.0]
    assert losses.wasserstein_discriminator(LOGITS, 2 * LOGITS).tolist() == [-2.0, 0.0, 3.0]


def test_the_gradient_penalty_of_a_linear_critic():
    """(|w| - target)^2, whatever the point; its derivative by w in closed form."""
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    penalty = losses.gradient_penalty(x, (x * w).sum(dim=[1, 2, 3])[:, None], target=1.5)
    norm = w.detach().norm()
    torch.testing.assert_close(penalty, (norm - 1.5).square().expand(3))
    (grad,) = torch.autograd.grad(penalty.sum(), w)
    torch.testing.assert_close(grad, 3 * 2 * (norm - 1.5) * w.detach() / norm)


def test_the_gradient_penalty_has_two_derivatives_and_is_finite_where_the_gradient_is_0():
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    w = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)

    def penalty(w):
        y = x.clone().requires_grad_()
        return losses.gradient_penalty(y, (y * w).square().sum(dim=[1, 2, 3])[:, None])

    assert gradcheck(penalty, w)
    assert gradgradcheck(penalty, w)
    flat = torch.zeros(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    value = losses.gradient_penalty(flat, (flat * w).square().sum(dim=[1, 2, 3])[:, None])
    assert value.tolist() == [1.0, 1.0]
    assert torch.autograd.grad(value.sum(), w)[0].isfinite().all()


def test_the_classifiers_cross_entropy():
    logits, labels = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]]), torch.eye(3)[[1, 2]]
    total = math.exp(1) + math.exp(2) + math.exp(0.5)
    torch.testing.assert_close(losses.cross_entropy(logits, labels), torch.tensor([math.log(total) - 2, math.log(3)]))


def test_relativistic_losses():
    """Of pairs: log(1 + exp(other - own))."""
    real, fake = torch.tensor([[-2.0], [0.0], [3.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    expected = [math.log1p(math.exp(d)) for d in (3.0, 0.0, -4.0)], [math.log1p(math.exp(d)) for d in (-3.0, 0.0, 4.0)]
    torch.testing.assert_close(losses.relativistic_discriminator(real, fake), torch.tensor(expected[0]))
    torch.testing.assert_close(losses.relativistic_generator(real, fake), torch.tensor(expected[1]))


def test_relativistic_losses_are_finite_for_huge_logits_and_see_differences_only():
    real, fake = torch.tensor([[-1e4], [1e4]]), torch.tensor([[1e4], [-1e4]])
    assert torch.equal(losses.relativistic_discriminator(real, fake), torch.tensor([2e4, 0.0]))
    assert torch.equal(losses.relativistic_generator(real, fake), torch.tensor([0.0, 2e4]))
    for loss in (losses.relativistic_discriminator, losses.relativistic_generator):
        assert torch.equal(loss(LOGITS + 64, 2 * LOGITS + 64), loss(LOGITS, 2 * LOGITS))


def test_relativistic_losses_have_two_derivatives():
    """The first by hand: each side's is the sigmoid of how wrong it is, and of opposite sign for the two images."""
    real, fake = LOGITS.double().requires_grad_(), (0.5 - LOGITS.double()).requires_grad_()
    for loss, sign in ((losses.relativistic_discriminator, -1), (losses.relativistic_generator, 1)):
        grads = torch.autograd.grad(loss(real, fake).sum(), [real, fake])
        expected = sign * torch.sigmoid(sign * (real - fake)).detach()
        torch.testing.assert_close(grads[0], expected)
        torch.testing.assert_close(grads[1], -expected)
        assert gradgradcheck(loss, (real, fake))


def test_r2_is_of_generated_images_as_constants():
    x = torch.randn(3, 2, 4, 5, requires_grad=True)
    w = torch.randn(2, 4, 5, requires_grad=True)
    penalty = losses.r2_penalty(x, (x * w).sum(dim=[1, 2, 3])[:, None])
    torch.testing.assert_close(penalty, w.square().sum().expand(3))
    torch.testing.assert_close(torch.autograd.grad(penalty.sum(), w)[0], 6 * w)
    with pytest.raises(AssertionError, match="the discriminator's alone"):
        losses.r2_penalty(2 * x, (2 * x * w).sum(dim=[1, 2, 3])[:, None])
