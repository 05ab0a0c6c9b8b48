"""Keeps a small network's convolution weights in the layout oneDNN computes in, for the length of a run.

PyTorch brings the weights into that layout at every call. On small feature maps, which is all a small network has, that
takes longer than the arithmetic. The results differ by rounding at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from modules.engine.upsampling import folded_layers

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

MEMORY_LIMIT_BYTES = 256 * 1024 * 1024
SHAPES_REMEMBERED = 2
"""Prompt and negative prompt take turns where they go through the network apart."""


class PackedConvolutions:
    """The convolutions of a UNet with packed weights; the network is altered inside `in_use` only.

    Make a new one when weights change. Networks on other devices, networks whose weights are kept in another format
    than they are computed in, and large ones work as ever.

    Args:
        unet: a network whose weights stay as they are while this is in use.
        memory_limit_bytes: above this size of all weights nothing is packed.
    """

    def __init__(self, unet: UNet2DConditionModel, *, memory_limit_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        layers = packable_layers(unet) if can_pack() else []
        if sum(layer.weight.nbytes for layer in layers) > memory_limit_bytes:
            layers = []
        self._stand_ins: dict[nn.Module, Callable[..., Tensor]] = {layer: _Packed(layer) for layer in layers}
        if layers:  # a packed convolution over repeated pixels beats four that are not packed
            self._stand_ins |= {layer: partial(Upsample2D.forward, layer) for layer in folded_layers(unet)}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the network's convolutions use the packed weights."""
        try:
            for layer, stand_in in self._stand_ins.items():
                layer.__dict__["forward"] = stand_in
            yield
        finally:
            for layer in self._stand_ins:
                layer.__dict__.pop("forward", None)


class _Packed:
    """Stands in for the `forward` of a convolution; packs its weights for each of its last input shapes."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = layer
        self._geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        self._packed: dict[torch.Size, Tensor] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        packed = self._packed.get(pixels.shape)
        if packed is None:
            if len(self._packed) >= SHAPES_REMEMBERED:
                self._packed.pop(next(iter(self._packed)))
            weight = self._layer.weight.detach()
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry, list(pixels.shape))
            self._packed[pixels.shape] = packed
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            pixels, packed, self._layer.bias, *self._geometry, "none", [], ""
        )
        return output


def can_pack() -> bool:
    """Whether this build of PyTorch has oneDNN, and the operators with which PyTorch's own compiler packs."""
    operators: Any = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
        hasattr(operators, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise")
    )


def packable_layers(network: nn.Module) -> list[nn.Conv2d]:
    """Plain convolutions in float32 on the CPU that nothing else stands in for."""
    return [
        module
        for module in network.modules()
        if type(module) is nn.Conv2d
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and "forward" not in module.__dict__
    ]
