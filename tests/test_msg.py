"""training/networks/msg.py against StyleGAN2's networks, of whose layers it is made. What it shares with others is in
test_growing.py."""

from typing import Any

import pytest
import torch

from styleloom.ops.upfirdn2d import setup_filter, upsample2d
from styleloom.training.networks import stylegan2
from styleloom.training.networks.growing import pyramid
from styleloom.training.networks.msg import Discriminator, Generator

SIZES: dict[str, Any] = {"channel_base": 64, "channel_max": 8, "mapping_layers": 2}


def tiny(module=None, c_dim=0, recompute=False):
    torch.manual_seed(0)
    its = (Generator, Discriminator) if module is None else (module.Generator, module.Discriminator)
    G = its[0](16, 24, 3, c_dim, z_dim=8, w_dim=6, recompute=recompute, **SIZES)
    D = its[1](16, 24, 3, c_dim, mbstd_group=2, recompute=recompute, **SIZES)
    return G.double(), D.double()


def noisy_pyramid(n=4):
    images = pyramid(torch.randn(n, 3, 24, 16).double(), 3)
    return [x + 0.1 * torch.randn_like(x) for x in images]


@pytest.mark.parametrize("noise", ["const", "none"])
@torch.no_grad()
def test_images_of_all_levels_sum_up_to_stylegan2s(noise):
    """The same features and ToRGBs; StyleGAN2 adds up what they make."""
    G, other = tiny()[0], tiny(stylegan2)[0]
    assert list(G.state_dict()) == list(other.state_dict())
    other.load_state_dict(G.state_dict())
    ws = torch.randn(2, G.num_ws, 6).double()
    images = G.synthesis.pyramid(ws, noise)
    assert [tuple(x.shape) for x in images] == [(2, 3, 6, 4), (2, 3, 12, 8), (2, 3, 24, 16)]
    assert torch.equal(G.synthesis(ws, noise), images[-1])
    total = images[0]
    for image in images[1:]:
        total = upsample2d(total, setup_filter([1, 3, 3, 1])) + image
    torch.testing.assert_close(total, other.synthesis(ws, noise))
    for mine, theirs in zip(other.synthesis.pyramid(ws, noise), images, strict=True):
        assert mine.shape == theirs.shape


@pytest.mark.parametrize("c_dim", [0, 2])
def test_logits_are_stylegan2s_if_the_lower_images_have_no_weight(c_dim):
    D, other = tiny(c_dim=c_dim)[1], tiny(stylegan2, c_dim)[1]
    state = D.state_dict()
    for name, theirs in other.state_dict().items():
        own = state[name]
        if own.shape == theirs.shape:
            continue
        assert own.shape[1] == theirs.shape[1] + 3, name
        features = theirs.shape[1] - (name == "b4.conv.weight")  # there, the standard deviation comes last
        own[:, features : features + 3] = 0
        kept = torch.cat([own[:, :features], own[:, features + 3 :]], dim=1)
        state[name] = own
        # The sum has more terms, so the gain is less.
        other.state_dict()[name].copy_(kept * (theirs.shape[1] / own.shape[1]) ** 0.5)
    other.load_state_dict({n: v if v.shape != state[n].shape else state[n] for n, v in other.state_dict().items()})
    D.load_state_dict(state)
    images, labels = noisy_pyramid(), torch.eye(2)[[0, 1, 1, 0]].double() if c_dim else None
    # The standard deviation is over the images' channels as well, so it is left out.
    for network in (D, other):
        network.b4.conv.weight.data[:, -1] = 0
    torch.testing.assert_close(D(images, labels), other(images[-1], labels))


def test_every_image_counts_and_gets_a_gradient_of_its_own():
    """Which does not pass through the others: the multi-scale gradients."""
    G, D = tiny()
    images = G.synthesis.pyramid(torch.randn(2, G.num_ws, 6).double())
    gradients = torch.autograd.grad(D(images).sum(), images, retain_graph=True)
    assert [bool(g.any()) for g in gradients] == [True, True, True]
    lowest = G.synthesis.get_parameter("b4.torgb.weight")
    (grad,) = torch.autograd.grad(D(images).sum(), lowest)
    assert grad.any()
    with torch.no_grad():
        logits = D(images)
        for i, image in enumerate(images):
            other = [*images[:i], image + torch.randn_like(image), *images[i + 1 :]]
            assert not torch.allclose(D(other), logits, atol=1e-3), i


def test_second_gradients_reach_all_images():
    """As R1 on all of them needs it; against finite differences along the gradient."""
    _, D = tiny()
    images = [x.requires_grad_() for x in noisy_pyramid(2)]

    def penalty():
        gradients = torch.autograd.grad(D(images).sum(), images, create_graph=True)
        return torch.stack([g.square().sum() for g in gradients]).sum()

    p = D.get_parameter("b8.conv0.weight")
    (grad,) = torch.autograd.grad(penalty(), p)
    direction = grad / grad.norm()
    values = []
    for step in (1e-5, -1e-5):
        p.data += step * direction
        values.append(penalty().item())
        p.data -= step * direction
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(grad.norm().item(), rel=1e-4)


def test_a_number_of_images_that_does_not_fit_is_named():
    _, D = tiny()
    with pytest.raises(ValueError, match="2 images for 3 levels"):
        D(noisy_pyramid()[1:])
