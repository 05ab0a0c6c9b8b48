"""Lets a causal language model write what "Fooocus V2" adds to a prompt, where the user has put one.

A folder with `config.json`, a tokeniser and weights below `models/prompt_expansion` is a model; none ships. Where its
folder has a `positive.txt`, one word a line, the model chooses among these words only, each at most once.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from modules.expansion import CHUNK_TOKENS, expand_prompt

logger = logging.getLogger(__name__)

WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
WORDS_FILE: Final = "positive.txt"
TOP_K: Final = 100
LENGTH: Final = 1024  # tokens, of a model that does not say
FORBIDDEN: Final = -8192.0  # added to the logits of tokens that may not come
REMEMBERED: Final = 256


class PromptExpander:
    """Expands prompts with the model that the user has, else with the program's own word model.

    problem: why the user's model could not be used, "" while nothing is wrong.
    """

    def __init__(self, folder: Path) -> None:
        """Load nothing yet.

        Args:
            folder: the configured one; its sibling folders are looked at after it, by name.
        """
        self._folder = folder
        self._tried: Path | None = None
        self._model: ExpansionModel | None = None
        self.problem = ""

    def __call__(self, prompt: str, seed: int) -> str:
        """What is encoded beside the prompt; see `ExpansionModel.expand` and `expand_prompt`."""
        model = self._loaded()
        return expand_prompt(prompt, seed) if model is None else model.expand(prompt, seed)

    @property
    def has_model(self) -> bool:
        """True when the user has a model, and it could be loaded or was not tried yet."""
        return find_model(self._folder) is not None and not self.problem

    def forget(self) -> None:
        """Free the memory the model takes; the next prompt loads it again."""
        self._tried, self._model, self.problem = None, None, ""

    def _loaded(self) -> "ExpansionModel | None":
        found = find_model(self._folder)
        if found != self._tried:
            self._tried, self._model, self.problem = found, None, ""
            try:
                self._model = ExpansionModel(found) if found else None
            except Exception as error:  # of a stranger's files; the pictures must not fail for that
                logger.exception("The prompt expansion in %s cannot be used", found)
                self.problem = (
                    f"The prompt expansion model in {found} cannot be used ({type(error).__name__}); "
                    "the built-in expansion took its place."
                )
        return self._model


def find_model(folder: Path) -> Path | None:
    """The folder itself if it holds a model, else the first of its siblings that does, else None."""
    siblings = sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []
    for candidate in (folder, *siblings):
        if (candidate / "config.json").is_file() and any((candidate / name).is_file() for name in WEIGHTS):
            return candidate
    return None


class ExpansionModel:
    """A causal language model on the CPU, in float32: the same seed gives the same words on any device."""

    def __init__(self, folder: Path) -> None:
        """Load model, tokeniser and word list.

        Raises:
            OSError, ValueError: files are missing or unusable.
        """
        from transformers.models.auto.modeling_auto import AutoModelForCausalLM
        from transformers.models.auto.tokenization_auto import AutoTokenizer
        from transformers.utils import logging as transformers_logging

        quiet: Any = transformers_logging
        quiet.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **local)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **local)
        self._model: Any = loaded.eval()
        self._length = int(getattr(self._model.config, "max_position_embeddings", LENGTH))
        self._end = self._tokenizer.eos_token_id
        words = folder / WORDS_FILE
        self._bias = self._bias_of(words.read_text(encoding="utf-8").splitlines()) if words.is_file() else None
        self._remembered = lru_cache(REMEMBERED)(self._written)

    def _bias_of(self, words: Sequence[str]) -> Tensor:
        """(vocabulary,): 0 for tokens that are exactly one of the words after a space, and for the comma."""
        vocabulary = self._tokenizer.get_vocab()
        bias = torch.full((self._model.config.vocab_size,), FORBIDDEN)
        allowed = {"\u0120" + word.strip().lower() for word in words if word.strip()}  # Ġ: a space, in byte-level BPE
        bias[[index for token, index in vocabulary.items() if token in allowed]] = 0.0
        return bias

    def expand(self, prompt: str, seed: int) -> str:
        """The prompt and what the model adds: as many tokens as fill the text encoder's last chunk of 75.

        Sampled from the 100 likeliest tokens at temperature 1.

        Args:
            prompt: the main line, wildcards and arrays resolved.
            seed: of the image; counts modulo 2^32.
        Returns:
            "" for an empty prompt; the prompt alone where it fills its chunk, or is too long for the model.
        """
        text = _tidied(prompt)
        return self._remembered(text, seed % 2**32) if text else ""

    @torch.no_grad()
    def _written(self, text: str, seed: int) -> str:
        """The expansion of a tidied prompt that says something."""
        ids: list[int] = list(self._tokenizer(f"{text},")["input_ids"])
        wanted = -(-len(ids) // CHUNK_TOKENS) * CHUNK_TOKENS
        if wanted == len(ids) or wanted > self._length:
            return text
        generator = torch.Generator().manual_seed(seed)
        comma = ids[-1]
        step: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        while len(ids) < wanted:
            answer = self._model(**step, use_cache=True)
            token = self._drawn(answer.logits[0, -1].float(), ids, comma, generator)
            if self._bias is None and token == self._end:
                break
            ids.append(token)
            step = {"input_ids": torch.tensor([[token]]), "past_key_values": answer.past_key_values}
        return _tidied(str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)))

    def _drawn(self, logits: Tensor, ids: list[int], comma: int, generator: torch.Generator) -> int:
        """The next token.

        Args:
            logits: (vocabulary,) float32.
            ids: the tokens so far. With a word list, none of them comes again but the comma.
        """
        if self._bias is not None:
            bias = self._bias.clone()
            bias[ids] = FORBIDDEN
            bias[comma] = 0.0
            logits = logits + bias
        best = torch.topk(logits, min(TOP_K, len(logits)))
        drawn = torch.multinomial(torch.softmax(best.values, 0), 1, generator=generator)
        return int(best.indices[drawn])


def _tidied(text: str) -> str:
    """One space where there are several, and no commas, full stops and spaces at the ends."""
    return re.sub(r"\s+", " ", text).strip(",. ")
