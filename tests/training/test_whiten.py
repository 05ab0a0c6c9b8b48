"""Changing the latent channels inside a VAE leaves its pictures alone."""

import pytest
import torch
from torch import Tensor

from training.nets import SCALING_FACTOR, new_vae
from training.whiten import alignment, fold, whitening


@pytest.fixture(scope="module")
def latents() -> Tensor:
    """Strongly correlated channels."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 4, generator=generator)
    return torch.einsum("ij,bjhw->bihw", mixing, torch.randn(8, 4, 16, 16, generator=generator)) + 0.7


def scaled(matrix: Tensor, mean: Tensor, latents: Tensor) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix, latents.double() - mean.view(1, 4, 1, 1)) * SCALING_FACTOR


def test_whitened_channels_are_independent_with_unit_variance(latents: Tensor) -> None:
    samples = scaled(*whitening(latents), latents).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(samples), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


@torch.no_grad()
def test_folding_changes_the_latents_and_not_the_picture(latents: Tensor) -> None:
    torch.manual_seed(0)
    vae = new_vae().eval()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    before = vae.encode(pixels).latent_dist.mean
    picture = vae.decode(before).sample
    matrix, mean = whitening(latents)
    fold(vae, matrix, mean)
    after = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(after * SCALING_FACTOR, scaled(matrix, mean, before).float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(vae.decode(after).sample, picture, rtol=1e-3, atol=1e-3)


def test_alignment_finds_a_linear_relation(latents: Tensor) -> None:
    turned = torch.einsum("ij,bjhw->bihw", torch.linalg.qr(torch.randn(4, 4)).Q, latents) + 0.3
    matrix, mean = alignment(latents * SCALING_FACTOR, turned * SCALING_FACTOR, smallest=0.01)
    torch.testing.assert_close(scaled(matrix, mean, latents).float(), turned * SCALING_FACTOR, rtol=1e-3, atol=1e-4)


def test_alignment_keeps_a_direction_that_the_known_latents_lack(latents: Tensor) -> None:
    flat = latents.clone()
    flat[:, 3] = flat[:, 0]
    matrix, _ = alignment(latents, flat, smallest=0.3)
    assert float(torch.linalg.svdvals(matrix).min()) == pytest.approx(0.3)
