"""Projects a prompt to attention keys and values once per run: they are the same at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

MEMORY_LIMIT_BYTES = 512 * 1024 * 1024
TEXTS_REMEMBERED = 2
"""Prompt and negative prompt take turns where they go through the network apart."""


class TextProjections:
    """Keys and values of the text in every cross-attention layer of a UNet, kept between forward passes.

    Long prompts make up to a third of a small network's work here, and the results are the same bits. The
    network is altered inside `in_use` only. Make a new one when weights change.

    Args:
        unet: a network whose weights stay as they are while this is in use.
        memory_limit_bytes: above this size nothing is kept, and the network works as ever.
    """

    def __init__(self, unet: UNet2DConditionModel, *, memory_limit_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        self._limit = memory_limit_bytes
        self._layers = [_Remembered(linear) for linear in _text_linears(unet)]
        self._width = sum(layer.linear.out_features for layer in self._layers)

    @contextmanager
    def in_use(self, prompt_embeds: Tensor) -> Iterator[None]:
        """Let the network's layers answer from memory for this very tensor, never written to meanwhile.

        Args:
            prompt_embeds: (n, tokens, C), what the network is about to be given.
        """
        rows, tokens, _ = prompt_embeds.shape
        if rows * tokens * self._width * prompt_embeds.element_size() * TEXTS_REMEMBERED > self._limit:
            yield
            return
        try:
            for layer in self._layers:
                layer.linear.__dict__["forward"] = layer
            yield
        finally:
            for layer in self._layers:
                layer.linear.__dict__.pop("forward", None)


class _Remembered:
    """Stands in for the `forward` of a linear layer; knows its last inputs by identity."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self._answers: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, text: Tensor) -> Tensor:
        known = self._answers.get(id(text))
        if known is not None and known[0] is text:
            return known[1]
        answer = type(self.linear).forward(self.linear, text)
        if len(self._answers) >= TEXTS_REMEMBERED:
            self._answers.pop(next(iter(self._answers)))
        # Keeping the text itself keeps its id from being given to another tensor.
        self._answers[id(text)] = (text, answer)
        return answer


def _text_linears(unet: UNet2DConditionModel) -> Iterator[nn.Linear]:
    """Key and value layers of the cross-attentions; not those whose `forward` something else has replaced."""
    for name, module in unet.named_modules():
        is_text_layer = name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(module, nn.Linear)
        if is_text_layer and "forward" not in module.__dict__:
            yield module
