"""Draws larger pictures than a small model was trained on: shapes on reduced latents, edges on whole ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from modules.engine.denoiser import Denoiser

FINE_SIGMA = 0.5
"""Noise level from which on the whole latents are looked at; from 1 on the embedded model repeats parts of things."""


class CoarseToFine:
    """`denoise(x, sigma) -> denoised` from two denoisers of the same model.

    A network that only saw small pictures draws a thing once in every such patch of a large one. Where noise hides the
    fine structure anyway, means of k×k latents hold what can be known: their noise has the level σ/k, and the model,
    asked at that level, sees a picture of its own size. Its answer, enlarged, is the estimate for the large one.

    Attributes:
        evaluations, model_seconds: of both; see `Denoiser`.
    """

    def __init__(self, coarse: Denoiser, fine: Denoiser, factor: int) -> None:
        """Take both.

        Args:
            coarse: conditioned on the reduced size.
            fine: conditioned on the size of the picture; best without guidance, which would paint patterns into it.
            factor: k, by which rows and columns of the latents are reduced; at least 2.
        """
        self._coarse, self._fine, self._factor = coarse, fine, factor

    @property
    def evaluations(self) -> int:
        return self._coarse.evaluations + self._fine.evaluations

    @property
    def model_seconds(self) -> float:
        return self._coarse.model_seconds + self._fine.model_seconds

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The guided estimate of the clean latents, (B, 4, h, w) float32 like `x`."""
        if sigma <= FINE_SIGMA:
            return self._fine(x, sigma)
        # A last row or column without a partner is the mean of fewer, and somewhat noisier than the model is told.
        reduced = F.avg_pool2d(x, self._factor, ceil_mode=True, count_include_pad=False)
        denoised = self._coarse(reduced, sigma / self._factor)
        return F.interpolate(denoised, size=x.shape[-2:], mode="bicubic")

    def drop(self, image: int) -> None:
        """Leave an image of the batch out from the next evaluation on; see `Denoiser.drop`."""
        self._coarse.drop(image)
        self._fine.drop(image)
