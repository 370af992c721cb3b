"""Adversarial losses and regularisers, as functions of tensors. All return one value a sample: the caller averages,
so that the result does not depend on how a batch is split over passes and ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic_generator(fake_logits: Tensor) -> Tensor:
    """Non-saturating logistic loss (Goodfellow et al. 2014, section 3): logits [N, 1] -> [N]."""
    return F.softplus(-fake_logits).flatten()


def logistic_discriminator_fake(fake_logits: Tensor) -> Tensor:
    """The generated half of the logistic loss (Goodfellow et al. 2014, eq. 1): logits [N, 1] -> [N]."""
    return F.softplus(fake_logits).flatten()


def logistic_discriminator_real(real_logits: Tensor) -> Tensor:
    """The real half of the logistic loss: logits [N, 1] -> [N]."""
    return F.softplus(-real_logits).flatten()


def relativistic_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic pairing loss (Jolicoeur-Martineau 2018, "The relativistic discriminator"; Huang et al. 2024, "The
    GAN is dead; long live the GAN!", section 2): each generated image is to look more real than the real one that it
    is paired with. Logits [N, 1] each -> [N]."""
    return F.softplus(real_logits - fake_logits).flatten()


def relativistic_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's side of it, with the roles exchanged: logits [N, 1] each -> [N]."""
    return F.softplus(fake_logits - real_logits).flatten()


def r1_penalty(real: Tensor, real_logits: Tensor) -> Tensor:
    """Squared norm of the gradient of the logits with respect to the reals (Mescheder et al. 2018, eq. 9).

    Args:
        real: [N, C, H, W], `requires_grad`.
        real_logits: [N, 1], computed from `real`.

    Returns:
        [N], differentiable once more; to be weighted by gamma / 2.
    """
    (grad,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return grad.square().sum(dim=[1, 2, 3])


def r2_penalty(fake: Tensor, fake_logits: Tensor) -> Tensor:
    """The same with respect to generated images (Mescheder et al. 2018, eq. 10), which are constants: [N, C, H, W],
    `requires_grad`, without a graph behind them. Logits [N, 1] -> [N]."""
    assert fake.is_leaf, "the penalty is the discriminator's alone"
    return r1_penalty(fake, fake_logits)


def wasserstein_generator(fake_scores: Tensor) -> Tensor:
    """Wasserstein loss (Arjovsky et al. 2017, "Wasserstein GAN", eq. 2): scores [N, 1] -> [N]."""
    return -fake_scores.flatten()


def wasserstein_discriminator(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The critic's side of it: scores [N, 1] each -> [N]."""
    return (fake_scores - real_scores).flatten()


def gradient_penalty(between: Tensor, scores: Tensor, target: float = 1.0) -> Tensor:
    """Squared deviation of the gradient's norm from the target (Gulrajani et al. 2017, eq. 3).

    Args:
        between: [N, C, H, W], points between real and generated images, `requires_grad`.
        scores: [N, 1], computed from `between`.
        target: gradient norm that is not penalised.

    Returns:
        [N], differentiable once more; to be weighted by lambda.
    """
    (grad,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
    return (torch.linalg.vector_norm(grad, dim=[1, 2, 3]) - target).square()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of an auxiliary classifier (Odena et al. 2017, eq. 2): logits and one-hot labels [N, c_dim] -> [N]."""
    return F.cross_entropy(logits, labels, reduction="none")


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """Length of the Jacobian of the generator along a random image direction (StyleGAN2, eq. 4).

    Args:
        images: [N, C, H, W], computed from `ws`.
        ws: [N, num_ws, w_dim].
        noise: [N, C, H, W] of unit variance; divided here by sqrt(H * W), so that lengths compare across resolutions.

    Returns:
        [N]: the square root of the squared gradient, summed over w_dim and averaged over the layers.
    """
    H, W = images.shape[2:]
    (grad,) = torch.autograd.grad((images * noise).sum() / (H * W) ** 0.5, ws, create_graph=True)
    return grad.square().sum(dim=2).mean(dim=1).sqrt()


def path_length_penalty(lengths: Tensor, mean: Tensor) -> Tensor:
    """(StyleGAN2, eq. 4): squared deviation [N] of the lengths [N] from their running mean, a scalar."""
    return (lengths - mean).square()
