"""Folds a linear change of the latent channels into a VAE: a whitening, or the channels that a UNet already knows.

The VAE's function is unchanged: the 4×4 map goes into quant_conv and its inverse into post_quant_conv.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from training.nets import SCALING_FACTOR


def whitening(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix W (4, 4) and mean m (4,) so that W(z − m) has covariance I / SCALING_FACTOR².

    Args:
        latents: (B, 4, h, w), as the encoder gives them.
    """
    samples = latents.double().transpose(0, 1).flatten(1)
    mean = samples.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(samples))
    # the symmetric root changes the channels least
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return root / SCALING_FACTOR, mean


@torch.no_grad()
def fold(vae: AutoencoderKL, matrix: Tensor, mean: Tensor) -> None:
    """Make the encoder give W(z − m) and the decoder undo it, exactly; W is (4, 4) and regular, m (4,), float64.

    The log-variances, which only the training of the VAE uses, become those of the mixture's main terms.
    """
    inward, outward = vae.quant_conv, vae.post_quant_conv
    kernel, bias = inward.weight[:, :, 0, 0].double(), inward.bias.double()
    shares = matrix**2
    total = shares.sum(1, keepdim=True)
    means = matrix @ kernel[:4], matrix @ (bias[:4] - mean)
    log_variances = (shares / total) @ kernel[4:], (shares / total) @ bias[4:] + total[:, 0].log()
    inward.weight.copy_(torch.cat([means[0], log_variances[0]])[:, :, None, None])
    inward.bias.copy_(torch.cat([means[1], log_variances[1]]))
    kernel = outward.weight[:, :, 0, 0].double()
    outward.bias.copy_(outward.bias.double() + kernel @ mean)
    outward.weight.copy_((kernel @ torch.linalg.inv(matrix))[:, :, None, None])


def alignment(latents: Tensor, known: Tensor, *, smallest: float = 0.3) -> tuple[Tensor, Tensor]:
    """Matrix W and mean m for `fold`, so that W(z − m) is as close to other latents of the same pictures as it can be.

    Args:
        latents, known: (B, 4, h, w), both times SCALING_FACTOR; `known` are what a trained UNet expects.
        smallest: singular values of W below this are raised to it: a direction that the known latents hardly use
            would otherwise drown in the noise.
    """
    samples = latents.double().transpose(0, 1).flatten(1).T
    targets = known.double().transpose(0, 1).flatten(1).T
    design = torch.cat([samples, torch.ones(len(samples), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, targets).solution
    left, values, right = torch.linalg.svd(solution[:4].T)
    matrix = left @ torch.diag(values.clamp(min=smallest)) @ right
    return matrix, -torch.linalg.solve(matrix, solution[4]) / SCALING_FACTOR
