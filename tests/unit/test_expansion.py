"""The words "Fooocus V2" adds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.expansion import (
    _LETTERS,
    CHUNK_TOKENS,
    _stems,
    approximate_tokens,
    expand_prompt,
    medium_of,
    mood_of,
    subject_of,
)
from modules.expansion_words import (
    ASPECTS,
    MEDIUM_CUES,
    MEDIUM_PHRASES,
    MOOD_CUES,
    MOOD_PHRASES,
    SMALL_WORDS,
    SUBJECT_CUES,
    SUBJECT_PHRASES,
)

SEEDS = st.integers(0, 2**63 - 1)
WORDS = sorted(
    {word for words in SUBJECT_CUES.values() for word in words} | {"light", "Soft", "focus,", "Ω", "(a:1.2)"}
)
PROMPTS = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


@pytest.mark.parametrize("prompt", ["", " ", " , . ", "()"])
def test_nothing_is_made_of_nothing(prompt):
    assert expand_prompt(prompt, 1) == ""


@given(PROMPTS, SEEDS)
def test_the_text_begins_with_the_prompt_and_depends_on_the_seed_alone(prompt, seed):
    text = expand_prompt(prompt, seed)
    assert text.startswith(prompt.strip(",. "))
    assert text == expand_prompt(prompt, seed)


@given(PROMPTS.filter(bool), SEEDS)
def test_no_word_is_said_twice(prompt, seed):
    base = prompt.strip(",. ")
    added = expand_prompt(prompt, seed)[len(base) :]
    words = [word for word in _LETTERS.findall(added.casefold()) if word not in SMALL_WORDS]
    assert not set(words) & set(_LETTERS.findall(prompt.casefold()))
    assert not _stems(added) & _stems(prompt)


@given(PROMPTS.filter(bool), SEEDS)
def test_the_last_chunk_is_never_overfilled(prompt, seed):
    used = approximate_tokens(prompt.strip(",. "))
    chunks = -(-used // CHUNK_TOKENS)
    assert approximate_tokens(expand_prompt(prompt, seed)) <= chunks * CHUNK_TOKENS


def test_seeds_differ():
    assert len({expand_prompt("a fox in the snow", seed) for seed in range(50)}) > 40


def test_a_golden_text_stays_the_same_on_every_machine():
    assert expand_prompt("a lighthouse", 1234) == (
        "a lighthouse, broken sunlight through clouds, winding leading line, high quality, cool shadows and "
        "warm highlights, freshness after rain, aerial perspective, golden hour glow, "
        "layered foreground and far distance"
    )


@pytest.mark.parametrize(
    ("prompt", "subject", "medium", "mood"),
    [
        ("two cats in a city at night", "animal", None, "dark"),
        ("oil painting of a mountain", "landscape", "paint", "even"),
        ("cute anime girl", "person", "illustration", "bright"),
        ("photo of sushi", "food", "photo", "even"),
        ("zzz", "anything", None, "even"),
    ],
)
def test_cues_tell_subject_medium_and_mood(prompt, subject, medium, mood):
    assert (subject_of(prompt), medium_of(prompt), mood_of(prompt)) == (subject, medium, mood)


def test_a_painting_gets_no_lens_words_and_a_dark_scene_no_sunshine():
    texts = [expand_prompt("oil painting of a gloomy forest", seed) for seed in range(200)]
    for word in ("lens", "bokeh", "exposure", "sunlight", "golden hour", "midday"):
        assert not any(word in text for text in texts)


def test_the_tables_fit_each_other():
    assert set(SUBJECT_PHRASES) == {*SUBJECT_CUES, "anything"}
    assert set(MEDIUM_PHRASES) == {*MEDIUM_CUES, "any"}
    assert set(MOOD_PHRASES) == {*MOOD_CUES, "even"}
    for phrases in (*SUBJECT_PHRASES.values(), *MEDIUM_PHRASES.values(), *MOOD_PHRASES.values()):
        assert set(phrases) <= set(ASPECTS)
        assert all(pool for pool in phrases.values())


def test_a_cue_word_stands_for_one_subject_only():
    words = [word for cues in SUBJECT_CUES.values() for word in cues]
    assert len(words) == len(set(words))
