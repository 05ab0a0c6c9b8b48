"""Number formats of a network: what its weights are kept in and what it computes in, one layer at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class NumberFormat:
    """How a network keeps its weights and how it computes.

    computed: format of all arithmetic; biases and norms are kept in it as well.
    stored: format the weights of linear, convolutional and embedding layers are kept in; None keeps the
        file's own where that is narrower than `computed`.
    """

    computed: torch.dtype
    stored: torch.dtype | None

    @classmethod
    def plain(cls, dtype: torch.dtype) -> "NumberFormat":
        """Weights and arithmetic in one format."""
        return cls(computed=dtype, stored=dtype)

    def stored_as(self, in_file: torch.dtype) -> torch.dtype:
        """The format in which weights of this format in the file are kept."""
        if self.stored is not None:
            return self.stored
        return in_file if in_file.itemsize < self.computed.itemsize else self.computed


def computed_format(network: nn.Module) -> torch.dtype:
    """What a network computes in and wants its inputs in; its first parameter may be kept in less."""
    return next(parameter for parameter in network.parameters() if parameter.ndim == 1).dtype


class Widening:
    """Brings one weight after another to the format it is computed in, in memory used again for each.

    New memory for each would cost more time than the conversion: the system hands it out page by page. The
    result holds until the next call, so one thread at a time may use the layers that share this.
    """

    def __init__(self, computed: torch.dtype) -> None:
        self.computed = computed
        self._memory: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight in the computed format, in its own shape and memory layout."""
        if weight.dtype == self.computed:
            return weight
        memory = self._memory
        if memory is None or memory.numel() < weight.numel() or memory.device != weight.device:
            with torch.inference_mode(False):  # it outlives the run, and is written to in others
                memory = torch.empty(weight.numel(), dtype=self.computed, device=weight.device)
            self._memory = memory
        widened: Tensor = memory.as_strided(weight.shape, weight.stride())
        widened.copy_(weight)
        return widened


class _WidenedLinear(nn.Linear):
    widened: Widening

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.widened(self.weight), self.bias)


class _WidenedConv2d(nn.Conv2d):
    widened: Widening

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.widened(self.weight), self.bias)
        return output


class _WidenedEmbedding(nn.Embedding):
    widened: Widening

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.widened.computed)


_WIDENED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _WidenedLinear,
    nn.Conv2d: _WidenedConv2d,
    nn.Embedding: _WidenedEmbedding,
}


def storable_weights(network: nn.Module) -> frozenset[str]:
    """Names of the parameters that may be kept in a narrower format than they are computed in."""
    return frozenset(f"{name}.weight" for name, module in network.named_modules() if type(module) in _WIDENED)


def widen_in_use(network: nn.Module, computed: torch.dtype) -> None:
    """Makes layers whose weights are kept in another format bring them to `computed` for each use.

    The stored weights stay as they are, so what alters them (LoRAs) works as on any network.
    """
    widened = Widening(computed)
    for module in _narrow_layers(network, computed):
        module.__class__ = _WIDENED[type(module)]
        module.widened = widened  # type: ignore[assignment]  # torch types every attribute as tensor or module


def weight_in_use(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The weight of a layer as it is computed with; for a widened one until the next layer is used."""
    widened = getattr(layer, "widened", None)
    return layer.weight if widened is None else widened(layer.weight)


def is_widened(network: nn.Module) -> bool:
    """Whether weights of the network are kept in another format than they are computed in."""
    return any(isinstance(module, tuple(_WIDENED.values())) for module in network.modules())


def _narrow_layers(network: nn.Module, computed: torch.dtype) -> Iterable[nn.Module]:
    for module in network.modules():
        if type(module) in _WIDENED and module.get_parameter("weight").dtype != computed:
            yield module
