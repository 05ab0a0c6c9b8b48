"""Prompt text to chunks of 77 weighted CLIP tokens: emphasis, words, embeddings, chunk borders."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

CHUNK_TOKENS = 77
CHUNK_ROOM = CHUNK_TOKENS - 2  # a chunk begins and ends with a token of its own
BEGIN_TOKEN = 49406
END_TOKEN = 49407
CLIP_L_PADDING = END_TOKEN
CLIP_G_PADDING = 0
UNSPLIT_LIMIT = 8  # words of fewer tokens are never cut by a chunk border
EMPHASIS = 1.1
EMBEDDING_PREFIX = "embedding:"
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

Vector = TypeVar("Vector")  # one vector of a textual inversion; what it is, only the encoder knows
EmbeddingLookup = Callable[[str], Sequence[Vector] | None]


@dataclass(frozen=True)
class Segment:
    """A stretch of prompt text with one weight; 1 is neutral."""

    text: str
    weight: float


@dataclass(frozen=True)
class Chunk(Generic[Vector]):
    """77 tokens for one run of the text encoder; a token is an id or an embedding's vector."""

    tokens: tuple[int | Vector, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> bool:
        """Whether any token has a weight other than 1."""
        return any(weight != 1.0 for weight in self.weights)


def parse_emphasis(text: str) -> list[Segment]:
    r"""Splits a prompt at its emphasis brackets.

    `(x)` multiplies the weight by 1.1, `(x:1.3)` sets it, brackets nest; `\(` and `\)` are literal, and so
    are brackets without a partner. Empty stretches are left out.
    """
    return _segments(text, _partners(text))


def _partners(text: str) -> dict[int, int]:
    """Position of every opening bracket that has a partner → position of that partner."""
    partners: dict[int, int] = {}
    waiting: list[int] = []
    position = 0
    while position < len(text):
        if text[position] == "\\" and text[position + 1 : position + 2] in ("(", ")"):
            position += 1
        elif text[position] == "(":
            waiting.append(position)
        elif text[position] == ")" and waiting:
            partners[waiting.pop()] = position
        position += 1
    return partners


def _segments(text: str, partners: dict[int, int]) -> list[Segment]:
    """Segments between partnered brackets; a list of what is left to do, so that nesting has no limit."""
    segments: list[Segment] = []
    pending = [(0, len(text), 1.0)]
    while pending:
        start, end, weight = pending.pop()
        literal = start
        position = start
        while position < end:
            if text[position] == "\\":
                position += 2
                continue
            if text[position] == "(" and position in partners:
                close = partners[position]
                inner, inner_end = _group_weight(text, position + 1, close, weight)
                _append(segments, text[literal:position], weight)
                pending.append((close + 1, end, weight))
                pending.append((position + 1, inner_end, inner))
                break
            position += 1
        else:
            _append(segments, text[literal:end], weight)
    return segments


def _group_weight(text: str, start: int, end: int, weight: float) -> tuple[float, int]:
    """Weight of a bracket's content, and where the content ends without its `:number`."""
    colon = text.rfind(":", start, end)
    if colon > start:
        try:
            number = float(text[colon + 1 : end])
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number, colon
    return weight * EMPHASIS, end


def _append(segments: list[Segment], text: str, weight: float) -> None:
    plain = text.replace("\\(", "(").replace("\\)", ")")
    if plain:
        segments.append(Segment(plain, weight))


class ClipTokenizer:
    """CLIP's byte-pair encoding of single words, lower-cased; one vocabulary serves both text encoders."""

    def __init__(self, folder: Path) -> None:
        """Reads vocab.json and merges.txt of `folder` (0.1 s)."""
        model = models.BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            unk_token="<|endoftext|>",
            end_of_word_suffix="</w>",
        )
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self.word = lru_cache(maxsize=20_000)(self._word)

    def _word(self, word: str) -> tuple[int, ...]:
        """Token ids of one word, without begin and end."""
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)


def chunk_prompt(
    text: str,
    tokenizer: ClipTokenizer,
    *,
    padding: int,
    embedding: EmbeddingLookup[Vector] | None = None,
) -> list[Chunk[Vector]]:
    """The chunks of one prompt text; always at least one.

    padding: the token id that fills a chunk after its end token (49407 for CLIP-L, 0 for CLIP-G).
    embedding: gives the vectors of `embedding:NAME`, or None for no such file; the word is then ignored.
    """
    writer = _ChunkWriter[Vector](padding)
    for segment in parse_emphasis(text):
        for word in segment.text.replace("\n", " ").split(" "):
            if word.startswith(EMBEDDING_PREFIX) and embedding is not None:
                name = word.removeprefix(EMBEDDING_PREFIX)
                vectors, rest = _look_up(name, embedding)
                writer.add(vectors, segment.weight)
                writer.add(tokenizer.word(rest), segment.weight)
            elif word:
                writer.add(tokenizer.word(word), segment.weight)
    return writer.finish()


def _look_up(name: str, embedding: EmbeddingLookup[Vector]) -> tuple[Sequence[Vector], str]:
    """Vectors of an embedding, and the commas after its name, which belong to the sentence."""
    vectors = embedding(name)
    if vectors is None and name.endswith(","):
        bare = name.rstrip(",")
        return embedding(bare) or (), name[len(bare) :]
    return vectors or (), ""


def empty_chunk(padding: int) -> Chunk[Vector]:
    """The chunk of an empty text: begin, end, padding."""
    return _ChunkWriter[Vector](padding).finish()[0]


class _ChunkWriter(Generic[Vector]):
    """Fills chunks word by word."""

    def __init__(self, padding: int) -> None:
        self._padding = padding
        self._done: list[Chunk[Vector]] = []
        self._tokens: list[int | Vector] = []
        self._weights: list[float] = []

    def add(self, word: Sequence[int | Vector], weight: float) -> None:
        if len(word) < UNSPLIT_LIMIT and len(word) > CHUNK_ROOM - len(self._tokens):
            self._close()
        rest = list(word)
        while rest:
            room = CHUNK_ROOM - len(self._tokens)
            if not room:
                self._close()
                continue
            self._tokens.extend(rest[:room])
            self._weights.extend([weight] * len(rest[:room]))
            rest = rest[room:]

    def finish(self) -> list[Chunk[Vector]]:
        if self._tokens or not self._done:
            self._close()
        return self._done

    def _close(self) -> None:
        fill = CHUNK_ROOM - len(self._tokens)
        tokens = (BEGIN_TOKEN, *self._tokens, END_TOKEN, *[self._padding] * fill)
        weights = (1.0, *self._weights, 1.0, *[1.0] * fill)
        self._done.append(Chunk(tokens, weights))
        self._tokens, self._weights = [], []
