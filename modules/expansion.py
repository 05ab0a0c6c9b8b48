"""Adds words on light, composition and finish that suit a prompt: the style "Fooocus V2", our own word model.

The model looks for cue words: the subject that is named first, the medium, the mood. Each has its phrases,
sorted by the aspect of a picture they speak about; the seed draws from them. The word lists were written for
this program.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from modules.expansion_words import (
    ASPECTS,
    MEDIUM_CUES,
    MEDIUM_PHRASES,
    MOOD_CUES,
    MOOD_PHRASES,
    NEUTRAL_MEDIUM,
    SMALL_WORDS,
    SUBJECT_CUES,
    SUBJECT_PHRASES,
)

CHUNK_TOKENS = 75
MAX_ADDED_TOKENS = 48
MAX_PHRASES = 11

_LETTERS = re.compile(r"[^\W_]+")
_TOKENS = re.compile(r"[^\W_]+|[^\w\s]|_")
_ENDINGS = ("ings", "ing", "edly", "ed", "ly", "es", "s", "y")
_CHARS_PER_TOKEN = 6  # rare words take as little as six letters a token


def expand_prompt(prompt: str, seed: int) -> str:
    """The prompt, then a comma and phrases that suit it; "" for a prompt that says nothing.

    No phrase holds a word that the prompt or an earlier phrase has already, small words aside. The whole is
    meant to fit the text encoder's chunk of 75 tokens; a prompt that nearly fills its last chunk gets few
    phrases or none.

    Args:
        prompt: the main line, wildcards and arrays resolved.
        seed: of the image. Same prompt, same seed → same text, on every machine.
    """
    text = re.sub(r"\s+", " ", prompt).strip(",. ")
    if not _LETTERS.search(text):
        return ""
    used = approximate_tokens(text)
    room = min(-used % CHUNK_TOKENS, MAX_ADDED_TOKENS)
    seen = _stems(text)
    phrases: list[str] = []
    for phrase in _suitable_phrases(text, random.Random(f"expansion {seed}")):
        stems, cost = _stems_and_cost(phrase)
        if cost > room or stems & seen:
            continue
        phrases.append(phrase)
        seen |= stems
        room -= cost
        if len(phrases) == MAX_PHRASES:
            break
    return ", ".join([text, *phrases])


def approximate_tokens(text: str) -> int:
    """About how many CLIP tokens a text takes: one a mark, one a word and each further six letters.

    High for common English, so that what is meant to fit a chunk does; no tokeniser is needed where prompts are
    prepared.
    """
    return sum(1 + (len(token) - 1) // _CHARS_PER_TOKEN for token in _TOKENS.findall(text))


def subject_of(prompt: str) -> str:
    """The subject the prompt's first cue word stands for, "anything" without one."""
    return _first_cue(prompt, SUBJECT_CUES) or "anything"


def medium_of(prompt: str) -> str | None:
    """The medium the prompt names, or None."""
    return _first_cue(prompt, MEDIUM_CUES)


def mood_of(prompt: str) -> str:
    """One of "dark", "bright" and "even", by the prompt's first cue."""
    return _first_cue(prompt, MOOD_CUES) or "even"


def _suitable_phrases(prompt: str, rng: random.Random) -> Iterator[str]:
    """Phrases for the prompt in a good mixture: one per aspect, then the second of each, and so on."""
    by_subject = SUBJECT_PHRASES[subject_of(prompt)]
    by_medium = MEDIUM_PHRASES[medium_of(prompt) or NEUTRAL_MEDIUM]
    mood = mood_of(prompt)
    pools: list[Sequence[str]] = []
    for aspect in ASPECTS:
        pool = list(by_medium.get(aspect, ()))
        pool += MOOD_PHRASES[mood].get(aspect, ())
        if aspect not in ("light", "mood") or mood == "even":
            pool += by_subject.get(aspect, ())
        rng.shuffle(pool)
        pools.append(pool)
    for rank in range(max(map(len, pools))):
        yield from (pool[rank] for pool in pools if rank < len(pool))


def _first_cue(prompt: str, cues: Mapping[str, frozenset[str]]) -> str | None:
    """The name whose cue word comes first in the prompt; plurals count."""
    for word in _LETTERS.findall(prompt.casefold()):
        singular = word.removesuffix("s")
        for name, words in cues.items():
            if word in words or singular in words:
                return name
    return None


@lru_cache(maxsize=1024)
def _stems_and_cost(phrase: str) -> tuple[set[str], int]:
    """The stems of a phrase of the word lists, and its tokens with the comma before it."""
    return _stems(phrase), approximate_tokens(phrase) + 1


def _stems(text: str) -> set[str]:
    """The words of a text without small ones and common endings, so that "light lights" count once."""
    return {_stem(word) for word in _LETTERS.findall(text.casefold()) if word not in SMALL_WORDS}


def _stem(word: str) -> str:
    """The word without a common English ending, at least three letters of it."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word
