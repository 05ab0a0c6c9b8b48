"""Muon for matrices beside AdamW for the rest, with the matrices' work shared between processes.

Muon: K. Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the update is scaled to
AdamW's size as in Liu et al. 2025 (arXiv:2502.16982), eq. 4.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: Tensor, *, iterations: int = 5) -> Tensor:
    """The matrix with its singular values brought near 1, by Newton–Schulz iteration.

    The iteration runs on the small Gram matrix only: X_k = P_k X_0, where P_k is a polynomial in X_0 X_0ᵀ; for a
    long matrix that is a third of the work.

    Args:
        matrix: (m, n) float32.
    Returns:
        (m, n) float32, singular values about 0.7–1.2 (tiny ones less).
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    product = torch.empty(0)
    a, b, c = NEWTON_SCHULZ
    for iteration in range(iterations):
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        product = step @ product if iteration else step
        if iteration < iterations - 1:
            gram = step @ gram @ step
    result = product @ wide
    return result.T if tall else result


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the samples seen, so that a run can be cut or extended freely.

    Attributes:
        peak: the flat learning rate of AdamW.
        warmup: samples of linear rise.
        decay_from, decay_to: samples between which it falls linearly to zero; None stays flat.
    """

    peak: float
    warmup: int = 4000
    decay_from: int | None = None
    decay_to: int | None = None

    def rate(self, samples: int) -> float:
        """Learning rate after this many samples."""
        rate = self.peak * min(1.0, (samples + 1) / self.warmup)
        if self.decay_from is not None and self.decay_to is not None:
            rate *= min(1.0, max(0.0, (self.decay_to - samples) / (self.decay_to - self.decay_from)))
        return rate


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon suits it: matrices and convolutions, but no embeddings and no first or last convolution."""
    outer = ("conv_in", "conv_out", "patch_embedding.layers.0.")
    is_embedding = parameter.ndim == 2 and "embed" in name
    return parameter.ndim >= 2 and not is_embedding and not any(part in name for part in outer)


class Optimizer:
    """Steps parameters by Muon (inner matrices and convolutions) and AdamW (everything else).

    The steps are made in float32: parameters of another format have float32 masters and are copies of them.

    Args:
        parameters: (name, parameter) of everything trained; all processes give the same order.
        muon_ratio: Muon's learning rate over AdamW's; None leaves everything to AdamW.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        weight_decay: float = 0.01,
        muon_ratio: float | None = 2.0,
    ) -> None:
        named = list(parameters)
        self.parameters = [parameter for _, parameter in named]
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        self._weight_decay, self._muon_ratio = weight_decay, muon_ratio
        inner = [muon_ratio is not None and is_inner_matrix(name, parameter) for name, parameter in named]
        self._matrices = [p for p, is_inner in zip(self.masters, inner, strict=True) if is_inner]
        others = [p for p, is_inner in zip(self.masters, inner, strict=True) if not is_inner]
        self._momenta = [torch.zeros_like(p) for p in self._matrices]
        self._adamw = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=True)

    def copy_masters(self) -> None:
        """Give the parameters the masters' values."""
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)

    def average_gradients(self) -> None:
        """Give every master the mean gradient of all processes, and none where none was worked out.

        All processes must have worked out the gradients of the same parameters.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            gradient = parameter.grad
            parameter.grad = None
            master.grad = None if gradient is None else gradient.float()
        if world_size() == 1:
            return
        gradients = [master.grad for master in self.masters if master.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, chunk in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(chunk.view(gradient.shape))

    @torch.no_grad()
    def step(self, rate: float, *, clip: float = 1.0) -> float:
        """Average, clip and apply the gradients; returns their norm before clipping."""
        self.average_gradients()
        norm = nn.utils.clip_grad_norm_(self.masters, clip)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        if self._muon_ratio is not None:
            self._muon_step(rate * self._muon_ratio)
        for master in self.masters:
            master.grad = None
        self.copy_masters()
        return float(norm)

    def _muon_step(self, rate: float) -> None:
        """Step the matrices that have a gradient.

        The others rest: an update has full size whatever the momentum's, so a stale one must not be repeated.
        """
        updates: list[tuple[nn.Parameter, Tensor]] = []
        for matrix, momentum in zip(self._matrices, self._momenta, strict=True):
            gradient = matrix.grad
            if gradient is None:
                continue
            momentum.mul_(0.95).add_(gradient)
            if len(updates) % world_size() == rank():
                nesterov = gradient.add(momentum, alpha=0.95)
                update = orthogonalised(nesterov.reshape(len(nesterov), -1))
            else:
                update = torch.empty(len(matrix), matrix.numel() // len(matrix))
            updates.append((matrix, update))
        self._share([update for _, update in updates])
        for matrix, update in updates:
            matrix.mul_(1 - rate * self._weight_decay)
            matrix.add_(update.view(matrix.shape), alpha=-rate * 0.2 * max(update.shape) ** 0.5)

    def _share(self, updates: list[Tensor]) -> None:
        """Fill in the updates that other processes worked out: process k of n did each n-th from k on."""
        if world_size() == 1:
            return
        for owner in range(world_size()):
            owned = updates[owner :: world_size()]
            if not owned:
                continue
            flat = torch.cat([update.reshape(-1) for update in owned])
            dist.broadcast(flat, owner)
            for update, chunk in zip(owned, flat.split([u.numel() for u in owned]), strict=True):
                update.copy_(chunk.view(update.shape))

    def state(self) -> dict[str, object]:
        """Everything but the parameters themselves."""
        return {"momenta": self._momenta, "adamw": self._adamw.state_dict()}

    def load_state(self, state: dict[str, object]) -> None:
        """Take over what `state` gave."""
        for momentum, saved in zip(self._momenta, state["momenta"], strict=True):  # type: ignore[call-overload]
            momentum.copy_(saved)
        self._adamw.load_state_dict(state["adamw"])  # type: ignore[arg-type]


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0
