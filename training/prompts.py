"""Turns texts into the conditioning of the UNet as the engine does: penultimate layers, pooled vector, chunks of 77."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.nets import END_TOKEN, NATIVE_PX

CHUNK = 77
PADDING = (END_TOKEN, 0)  # of the first and of the second tower


@dataclass(frozen=True)
class Encoding:
    """Text conditioning.

    Attributes:
        hidden: (B, tokens, 320), both towers' penultimate layers side by side, without the final norm.
        pooled: (B, 192), the second tower's projection of the first end token.
    """

    hidden: Tensor
    pooled: Tensor


class PromptEncoder(nn.Module):
    """Both text towers behind one tokenizer.

    Args:
        vocabulary: folder with vocab.json and merges.txt of the standard CLIP vocabulary.
    """

    def __init__(self, towers: tuple[CLIPTextModel, CLIPTextModelWithProjection], vocabulary: Path) -> None:
        super().__init__()
        self.first, self.second = towers
        self._tokenizer = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))

    def token_ids(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """(B, length) token ids for each tower; longer texts are cut."""
        rows = self._tokenizer(list(texts), truncation=True, max_length=length).input_ids
        first, second = (torch.tensor([row + [padding] * (length - len(row)) for row in rows]) for padding in PADDING)
        return first, second

    def forward(self, texts: Sequence[str], length: int = CHUNK) -> Encoding:
        """Encode each text as one chunk; a `length` below 77 saves work and changes only the padding."""
        first_ids, second_ids = self.token_ids(texts, length)
        first = self.first(first_ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(second_ids, output_hidden_states=True)
        return Encoding(torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds)


def joined(encodings: Sequence[Encoding]) -> Encoding:
    """Several texts as one conditioning: tokens side by side, pooled vectors summed."""
    hidden = torch.cat([encoding.hidden for encoding in encodings], dim=1)
    return Encoding(hidden, torch.stack([encoding.pooled for encoding in encodings]).sum(0))


def consistent_time_ids(height: int, width: int) -> tuple[float, ...]:
    """The six size numbers that name the picture's own size, in steps of 64 px."""
    target = [64.0 * round(side / 64) for side in (height, width)]
    return (*target, 0.0, 0.0, *target)


def scaled_time_ids(height: int, width: int, scale: float) -> tuple[float, ...]:
    """The six size numbers of a picture said to come from one `scale` times as large."""
    target = [64.0 * round(side / 64) for side in (height, width)]
    return (float(int(height * scale)), float(int(width * scale)), 0.0, 0.0, *target)


def native_time_ids(count: int) -> Tensor:
    """(count, 6) size numbers of the native square."""
    return torch.tensor([consistent_time_ids(NATIVE_PX, NATIVE_PX)] * count)
