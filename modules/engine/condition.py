"""Prompts to conditioning: text embeddings, pooled embeddings and the size numbers of SDXL."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from modules.engine.embeddings import EmbeddingFolder
from modules.engine.formats import computed_format
from modules.engine.store import SdxlModel
from modules.engine.tokens import (
    CLIP_G_PADDING,
    CLIP_L_PADDING,
    EMBEDDING_PREFIX,
    END_TOKEN,
    Chunk,
    ClipTokenizer,
    chunk_prompt,
    empty_chunk,
)
from modules.engine.weights import Architecture

logger = logging.getLogger(__name__)

DEFAULT_CLIP_SKIP = 2
REFINER_SCORE = {True: 6.0, False: 2.5}  # aesthetic score for the positive and for the negative text
TextTower = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True)
class Conditioning:
    """What tells the UNet what to draw, for B images.

    prompt_embeds: (B, 77·n, C) float32.
    pooled_prompt_embeds: (B, P) float32; P is 0 where the UNet takes no vector.
    time_ids: (B, 6) float32, the emphasised size numbers for the first part of the schedule.
    consistent_time_ids: (B, 6) float32, the plain size numbers for the rest.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    time_ids: Tensor
    consistent_time_ids: Tensor

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.prompt_embeds.shape[0]

    def expand(self, batch: int) -> "Conditioning":
        """The same conditioning for `batch` images; this one must be for a single image."""
        return Conditioning(
            self.prompt_embeds.expand(batch, -1, -1),
            self.pooled_prompt_embeds.expand(batch, -1),
            self.time_ids.expand(batch, -1),
            self.consistent_time_ids.expand(batch, -1),
        )


def resized(conditioning: Conditioning, *, width: int, height: int, adm_scaler: float) -> Conditioning:
    """The same words for pictures of another size in pixels; see `TextConditioner.condition`."""
    emphasised, consistent = _time_ids(width, height, adm_scaler, conditioning.time_ids.device)
    return replace(
        conditioning,
        time_ids=emphasised.expand(conditioning.batch, -1),
        consistent_time_ids=consistent.expand(conditioning.batch, -1),
    )


def stack_conditionings(conditionings: Sequence[Conditioning]) -> Conditioning:
    """One conditioning for all images of several; their texts must have the same number of tokens.

    Raises:
        ValueError: token counts differ; such images are sampled in separate batches.
    """
    lengths = {conditioning.prompt_embeds.shape[1] for conditioning in conditionings}
    if len(lengths) > 1:
        raise ValueError(f"Texts of {sorted(lengths)} tokens cannot share a batch.")
    return Conditioning(
        torch.cat([conditioning.prompt_embeds for conditioning in conditionings]),
        torch.cat([conditioning.pooled_prompt_embeds for conditioning in conditionings]),
        torch.cat([conditioning.time_ids for conditioning in conditionings]),
        torch.cat([conditioning.consistent_time_ids for conditioning in conditionings]),
    )


def adm_time_ids(width: int, height: int, scaler: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The emphasised and the consistent size numbers of a picture of width × height pixels.

    Emphasised: [⌊H·s⌋, ⌊W·s⌋, 0, 0, h, w]; consistent: [h, w, 0, 0, h, w]; h and w are H and W rounded to
    multiples of 64, half to even. 1152×896 at 1.5: (1344, 1728, 0, 0, 896, 1152) and (896, 1152, 0, 0, 896, 1152).
    """
    target = (64 * round(height / 64), 64 * round(width / 64))
    return (int(height * scaler), int(width * scaler), 0, 0, *target), (*target, 0, 0, *target)


def _time_ids(width: int, height: int, scaler: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as (1, 6) float32."""
    emphasised, consistent = torch.tensor(adm_time_ids(width, height, scaler), dtype=torch.float32, device=device)
    return emphasised[None], consistent[None]


@dataclass(frozen=True)
class TextEncoding:
    """One or several texts, encoded: prompt_embeds (1, 77·n, C) and pooled_prompt_embeds (1, P), float32."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


class TextConditioner:
    """Encodes prompt texts with a model's text encoders and remembers what it has encoded.

    Every text is encoded alone, so its embeddings never depend on what was encoded before or beside it.
    """

    def __init__(
        self,
        tokenizer: ClipTokenizer,
        *,
        embeddings: EmbeddingFolder | None = None,
        remembered: int = 64,
    ) -> None:
        """remembered: how many texts are kept (0.6 MB each with full-size encoders)."""
        self._tokenizer = tokenizer
        self._embeddings = embeddings
        self._remembered = remembered
        self._cache: OrderedDict[tuple[object, ...], TextEncoding] = OrderedDict()

    def condition(
        self,
        model: SdxlModel,
        texts: Sequence[str],
        *,
        width: int,
        height: int,
        adm_scaler: float,
        clip_skip: int = DEFAULT_CLIP_SKIP,
        pooled_texts: int | None = None,
    ) -> Conditioning:
        """The conditioning of one image; `Conditioning.expand` makes it one of many.

        Args:
            texts: encoded one by one and joined along the tokens.
            width, height: size of the picture in pixels, 8 × its latents.
            adm_scaler: factor of the emphasised size numbers (adm_scaler_positive or _negative).
            clip_skip: 1 takes the last layer of the text encoders, 2 the one before, up to 12.
            pooled_texts: how many of the first texts add to the pooled vector; all by default.
        """
        encoding = self.encode(model, texts, clip_skip=clip_skip, pooled_texts=pooled_texts)
        emphasised, consistent = _time_ids(width, height, adm_scaler, encoding.prompt_embeds.device)
        return Conditioning(encoding.prompt_embeds, encoding.pooled_prompt_embeds, emphasised, consistent)

    def encode(
        self,
        model: SdxlModel,
        texts: Sequence[str],
        *,
        clip_skip: int = DEFAULT_CLIP_SKIP,
        pooled_texts: int | None = None,
    ) -> TextEncoding:
        """Embeddings of several texts joined along the tokens, and the sum of the first pooled vectors.

        An empty list means the empty text, which is encoded like any other.
        """
        encodings = [self._encode_text(model, text, clip_skip) for text in texts or ("",)]
        pooled = [encoding.pooled_prompt_embeds for encoding in encodings[:pooled_texts]]
        return TextEncoding(
            torch.cat([encoding.prompt_embeds for encoding in encodings], dim=1),
            torch.stack(pooled).sum(0) if pooled else torch.zeros_like(encodings[0].pooled_prompt_embeds),
        )

    def token_count(self, texts: Sequence[str]) -> int:
        """How many tokens the embeddings of several texts have together: 77 for each chunk of each text."""
        return 77 * sum(
            max(len(self._chunks(text, "clip_l", CLIP_L_PADDING)), len(self._chunks(text, "clip_g", CLIP_G_PADDING)))
            for text in texts or ("",)
        )

    def _encode_text(self, model: SdxlModel, text: str, clip_skip: int) -> TextEncoding:
        key = (model.version, text, clip_skip)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        encoding = self._run(model, text, clip_skip)
        if EMBEDDING_PREFIX not in text:  # what an embedding's name means can change on disk
            self._cache[key] = encoding
            if len(self._cache) > self._remembered:
                self._cache.popitem(last=False)
        return encoding

    @torch.inference_mode()
    def _run(self, model: SdxlModel, text: str, clip_skip: int) -> TextEncoding:
        chunks_l = self._chunks(text, "clip_l", CLIP_L_PADDING)
        chunks_g = self._chunks(text, "clip_g", CLIP_G_PADDING)
        while len(chunks_l) != len(chunks_g):  # an embedding may have more vectors for one tower than for the other
            shorter, padding = (
                (chunks_l, CLIP_L_PADDING) if len(chunks_l) < len(chunks_g) else (chunks_g, CLIP_G_PADDING)
            )
            shorter.append(empty_chunk(padding))
        hidden_l, _ = encode_chunks(model.clip_l, chunks_l, padding=CLIP_L_PADDING, clip_skip=clip_skip)
        hidden_g, last = encode_chunks(model.clip_g, chunks_g, padding=CLIP_G_PADDING, clip_skip=clip_skip)
        tower = model.clip_g.text_model
        end = _first_end(chunks_g[0])
        pooled = tower.final_layer_norm(last[:1, end])
        projected = pooled.float() @ model.clip_g.text_projection.weight.float().t()
        return TextEncoding(torch.cat([hidden_l, hidden_g], dim=-1), projected)

    def _chunks(self, text: str, tower: str, padding: int) -> list[Chunk[Tensor]]:
        look_up = partial(self._embeddings.vectors, tower=tower) if self._embeddings else None
        return chunk_prompt(text, self._tokenizer, padding=padding, embedding=look_up)


def _first_end(chunk: Chunk[Tensor]) -> int:
    return next(index for index, token in enumerate(chunk.tokens) if isinstance(token, int) and token == END_TOKEN)


def encode_chunks(
    tower: TextTower,
    chunks: Sequence[Chunk[Tensor]],
    *,
    padding: int,
    clip_skip: int,
) -> tuple[Tensor, Tensor]:
    """Hidden states of one text's chunks, with its emphasis worked in.

    The state of a weighted token moves away from (or towards) the state of the empty text at its place; the
    mean of each chunk is then restored.

    Args:
        padding: the tower's padding token, for the empty text.
        clip_skip: layers counted from the end; more than there are means the last one after the final norm.
    Returns:
        (1, 77·n, C) float32 states, and (n, 77, C) last states before the final norm in the tower's format.
    """
    weighted = any(chunk.weighted for chunk in chunks)
    run = [*chunks, empty_chunk(padding)] if weighted else list(chunks)
    states = _hidden_states(tower, _embed(tower, run))
    chosen = _text_model(tower).final_layer_norm(states[-1]) if clip_skip >= len(states) else states[-clip_skip]
    hidden = chosen.float()
    if weighted:
        hidden = _emphasise(hidden[:-1], hidden[-1], chunks)
    return hidden.reshape(1, -1, hidden.shape[-1]), states[-1]


def _emphasise(hidden: Tensor, empty: Tensor, chunks: Sequence[Chunk[Tensor]]) -> Tensor:
    weights = torch.tensor([chunk.weights for chunk in chunks], device=hidden.device)[:, :, None]
    moved = torch.where(weights == 1.0, hidden, (hidden - empty) * weights + empty)
    before, after = hidden.mean((1, 2), keepdim=True), moved.mean((1, 2), keepdim=True)
    changed = torch.tensor([chunk.weighted for chunk in chunks], device=hidden.device)[:, None, None]
    return torch.where(changed & (after != 0), moved * (before / after), moved)


def _text_model(tower: TextTower) -> CLIPTextModel:
    inner = getattr(tower, "text_model", tower)
    assert isinstance(inner, CLIPTextModel)
    return inner


def _embed(tower: TextTower, chunks: Sequence[Chunk[Tensor]]) -> Tensor:
    """(n, 77, C) token embeddings plus positions."""
    embeddings = _text_model(tower).embeddings
    table = embeddings.token_embedding.weight
    rows = [_embed_chunk(chunk, table) for chunk in chunks]
    computed = computed_format(tower)
    return torch.stack(rows).to(computed) + embeddings.position_embedding.weight.to(computed)


def _embed_chunk(chunk: Chunk[Tensor], table: Tensor) -> Tensor:
    fits = [token for token in chunk.tokens if isinstance(token, int) or token.shape[-1] == table.shape[1]]
    dropped = len(chunk.tokens) - len(fits)
    if dropped:
        logger.warning("%d embedding vectors do not have the text encoder's width and are left out.", dropped)
        fits += [chunk.tokens[-1]] * dropped
    ids = torch.tensor([token if isinstance(token, int) else 0 for token in fits], device=table.device)
    embedded = table[ids]
    for position, token in enumerate(fits):
        if isinstance(token, Tensor):
            embedded[position] = token.to(embedded)
    return embedded


def _hidden_states(tower: TextTower, embedded: Tensor) -> list[Tensor]:
    """States before the first layer and after each one, without the final norm."""
    length = embedded.shape[1]
    mask = torch.full((length, length), float("-inf"), dtype=embedded.dtype, device=embedded.device).triu_(1)
    states = [embedded]
    for layer in _text_model(tower).encoder.layers:
        states.append(layer(states[-1], mask[None, None]))
    return states


def refiner_conditioning(
    conditioning: Conditioning,
    *,
    base: SdxlModel,
    refiner: SdxlModel,
    positive: bool,
    width: int,
    height: int,
) -> Conditioning:
    """The base model's conditioning as the refiner's UNet takes it.

    An SDXL-shaped refiner takes it as it is; the SDXL refiner the part of CLIP-G and, instead of
    two sizes, the plain size of the picture and a score; Stable Diffusion 1.5 the part of CLIP-L after its final norm,
    and no vector.

    Args:
        positive: whether it is the prompt's conditioning, else the negative prompt's.
        width, height: size of the picture in pixels, 8 × its latents.
    """
    width_l = base.clip_l.config.hidden_size
    embeds = conditioning.prompt_embeds
    if refiner.facts.architecture is Architecture.SDXL_REFINER:
        row = torch.tensor([[height, width, 0, 0, REFINER_SCORE[positive]]], device=embeds.device)
        numbers = row.expand(conditioning.batch, -1)
        return replace(conditioning, prompt_embeds=embeds[..., width_l:], time_ids=numbers, consistent_time_ids=numbers)
    if refiner.facts.architecture is Architecture.SD15:
        norm = base.clip_l.final_layer_norm
        part = torch.nn.functional.layer_norm(
            embeds[..., :width_l], (width_l,), norm.weight.float(), norm.bias.float(), norm.eps
        )
        return replace(conditioning, prompt_embeds=part, pooled_prompt_embeds=conditioning.pooled_prompt_embeds[:, :0])
    return conditioning
