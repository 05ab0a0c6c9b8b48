"""Prompts become weighted chunks of 77 tokens exactly as Fooocus' users know it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from modules.engine.tokens import (
    BEGIN_TOKEN,
    CLIP_G_PADDING,
    CLIP_L_PADDING,
    END_TOKEN,
    Chunk,
    ClipTokenizer,
    chunk_prompt,
    parse_emphasis,
)

FOLDER = Path(__file__).parents[2] / "models" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(FOLDER)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a (cat:1.3), (big (red:1.2) dog)",
            [("a ", 1), ("cat", 1.3), (", ", 1), ("big ", 1.1), ("red", 1.2), (" dog", 1.1)],
        ),
        ("((x))", [("x", 1.1 * 1.1)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("(a:x)", [("a:x", 1.1)]),
        ("(:1.5)", [(":1.5", 1.1)]),
        ("(a:nan)", [("a:nan", 1.1)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(open", [("(open", 1)]),
        ("a) b", [("a) b", 1)]),
        (r"\(lit\) (w:0.5)", [("(lit) ", 1), ("w", 0.5)]),
        ("()", []),
        ("", []),
    ],
)
def test_emphasis_of_brackets(text: str, expected: list[tuple[str, float]]) -> None:
    segments = parse_emphasis(text)

    assert [segment.text for segment in segments] == [piece for piece, _ in expected]
    assert [segment.weight for segment in segments] == pytest.approx([weight for _, weight in expected])


def test_thousands_of_brackets_are_parsed() -> None:
    segments = parse_emphasis("(" * 5000 + "x" + ")" * 5000)

    assert [segment.text for segment in segments] == ["x"]


@given(st.text(alphabet="ab (): .1\\\n", max_size=60))
def test_no_letter_of_a_prompt_is_lost(text: str) -> None:
    kept = "".join(segment.text for segment in parse_emphasis(text))

    assert [letter for letter in kept if letter in "ab"] == [letter for letter in text if letter in "ab"]


def test_ids_equal_those_of_the_transformers_tokenizer(tokenizer: ClipTokenizer) -> None:
    theirs = CLIPTokenizer(vocab=str(FOLDER / "vocab.json"), merges=str(FOLDER / "merges.txt"))
    text = "a photo of an astronaut riding a horse, Über-naïve 3d café's 東京 🍎 don't 1024x768!"

    ours = [number for word in text.split(" ") for number in tokenizer.word(word)]

    assert ours == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours[:8] == [320, 1125, 539, 550, 18376, 6765, 320, 4558]


def test_short_text_is_one_padded_chunk(tokenizer: ClipTokenizer) -> None:
    (chunk_l,) = chunk_prompt("a cat", tokenizer, padding=CLIP_L_PADDING)
    (chunk_g,) = chunk_prompt("a cat", tokenizer, padding=CLIP_G_PADDING)

    assert chunk_l.tokens == (BEGIN_TOKEN, 320, 2368, *[END_TOKEN] * 74)
    assert chunk_g.tokens == (BEGIN_TOKEN, 320, 2368, END_TOKEN, *[0] * 73)
    assert not chunk_l.weighted


@pytest.mark.parametrize("text", ["", "   ", "()", "\n"])
def test_empty_text_is_one_empty_chunk(tokenizer: ClipTokenizer, text: str) -> None:
    (chunk,) = chunk_prompt(text, tokenizer, padding=0)

    assert chunk.tokens == (BEGIN_TOKEN, END_TOKEN, *[0] * 75)


def test_hundred_words_are_two_chunks(tokenizer: ClipTokenizer) -> None:
    chunks = chunk_prompt("a " * 100, tokenizer, padding=0)

    assert [_words(chunk) for chunk in chunks] == [75, 25]
    assert {len(chunk.tokens) for chunk in chunks} == {77}


def test_word_of_eight_tokens_or_more_is_split_at_the_border(tokenizer: ClipTokenizer) -> None:
    first, second = chunk_prompt("a " * 70 + "supercalifragilisticexpialidocious b", tokenizer, padding=CLIP_L_PADDING)

    assert _words(first) == 75
    assert second.tokens[1:5] == tokenizer.word("supercalifragilisticexpialidocious")[5:]
    assert second.tokens[5:7] == (*tokenizer.word("b"), END_TOKEN)


def test_shorter_word_moves_whole_to_the_next_chunk(tokenizer: ClipTokenizer) -> None:
    first, second = chunk_prompt("a " * 73 + "photorealistic hyperrealism", tokenizer, padding=0)

    assert first.tokens[1 + 73 :] == (
        *tokenizer.word("photorealistic"),
        END_TOKEN,
        *[0] * (77 - 75 - len(tokenizer.word("photorealistic"))),
    )
    assert second.tokens[1:4] == (*tokenizer.word("hyperrealism"), END_TOKEN)


def _words(chunk: Chunk[str]) -> int:
    return chunk.tokens.index(END_TOKEN) - 1


def test_newline_parts_words_and_weights_follow_their_tokens(tokenizer: ClipTokenizer) -> None:
    (chunk,) = chunk_prompt("(red:1.5)\nhouse", tokenizer, padding=0)

    assert chunk.tokens[1:3] == (*tokenizer.word("red"), *tokenizer.word("house"))
    assert chunk.weights[:4] == (1.0, 1.5, 1.0, 1.0)


def test_embedding_takes_the_place_of_its_word(tokenizer: ClipTokenizer) -> None:
    known = {"style": ["v1", "v2"]}

    (chunk,) = chunk_prompt("a (embedding:style,:0.5) cat", tokenizer, padding=0, embedding=known.get)

    assert chunk.tokens[1:6] == (320, "v1", "v2", *tokenizer.word(","), 2368)
    assert chunk.weights[1:6] == (1.0, 0.5, 0.5, 0.5, 1.0)


def test_unknown_embedding_is_left_out(tokenizer: ClipTokenizer) -> None:
    def nothing(name: str) -> None:
        return None

    (chunk,) = chunk_prompt("a embedding:none cat", tokenizer, padding=0, embedding=nothing)

    assert chunk.tokens[1:4] == (320, 2368, END_TOKEN)
