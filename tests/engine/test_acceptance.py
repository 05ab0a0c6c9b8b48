"""What the engine was accepted by: golden numbers G-1 to G-7 and the acceptance list, item by item, with their tests.

The golden numbers of texts (G-1 to G-3) are checked here; the rest is a table of the tests that show each item, and a
test that they exist.
"""

import ast
import random
from functools import cache
from pathlib import Path

import pytest

from modules.prompts import (
    LoraChoice,
    add_tagged_loras,
    choose_elements,
    clean_line,
    fill_wildcards,
    lora_stems,
    take_lora_tags,
)

TESTS = Path(__file__).parents[1]
FILES = lora_stems(["foo.safetensors", "sub/bar.safetensors", "ui.safetensors"])
WORDS = {"color": ("red", "green", "blue"), "animal": ("cat", "dog"), "combo": ("__color__ __animal__",)}

SHOWN_BY = {
    "G-4 emphasis": ("engine/test_tokens.py", "test_emphasis_of_brackets"),
    "G-4 tokens": ("engine/test_tokens.py", "test_short_text_is_one_padded_chunk"),
    "G-4 chunks": ("engine/test_tokens.py", "test_hundred_words_are_two_chunks"),
    "G-4 long words": ("engine/test_tokens.py", "test_word_of_eight_tokens_or_more_is_split_at_the_border"),
    "G-4 short words": ("engine/test_tokens.py", "test_shorter_word_moves_whole_to_the_next_chunk"),
    "G-5 table": ("engine/test_sigmas.py", "test_training_table"),
    "G-5 schedules": ("engine/test_sigmas.py", "test_schedule_gives_published_levels"),
    "G-5 timesteps": ("engine/test_sigmas.py", "test_timesteps_of_a_schedule"),
    "G-5 strength": ("engine/test_sigmas.py", "test_strength_runs_the_requested_number_of_steps"),
    "G-5 percent": ("engine/test_sigmas.py", "test_percent_to_sigma"),
    "G-5 output rules": ("engine/test_sigmas.py", "test_output_rules"),
    "G-6": ("engine/test_samplers.py", "test_sampler_gives_published_numbers"),
    "G-7": ("engine/test_guidance.py", "test_filter_gives_published_numbers"),
    "2 same request, same pixels": ("engine/test_generate.py", "test_the_same_request_gives_the_same_pixels"),
    "2 refiner, three swap methods": ("engine/test_generate.py", "test_refiners_take_over_and_repeat_themselves"),
    "3 image i is the single image": ("engine/test_generate.py", "test_image_i_equals_the_single_image_with_its_seed"),
    "3 its bits with --deterministic": (
        "engine/test_generate.py",
        "test_with_deterministic_image_i_has_the_bits_of_the_single_image",
    ),
    "4 every parameter acts": (
        "engine/test_generate.py",
        "test_every_parameter_changes_the_picture_and_leaves_no_trace",
    ),
    "4 forced parameters do not": ("engine/test_generate.py", "test_forced_parameters_of_a_mode_change_nothing"),
    "8 w and -w": ("engine/test_loras.py", "test_a_weight_and_its_opposite_cancel"),
    "8 selecting again": (
        "engine/test_loras.py",
        "test_several_loras_add_up_and_selecting_again_starts_from_pristine_weights",
    ),
    "9 stop": ("engine/test_generate.py", "test_stop_keeps_what_is_finished"),
    "9 stop at once": ("engine/test_generate.py", "test_stop_takes_effect_at_the_next_evaluation"),
    "9 skip": ("engine/test_generate.py", "test_skip_drops_one_image_of_a_batch_and_the_others_stay_as_they_are"),
    "9 skip the only one": ("engine/test_generate.py", "test_a_task_whose_only_image_is_skipped_is_skipped"),
    "9 progress": ("engine/test_generate.py", "test_progress_never_falls_and_counts_the_steps"),
    "9 one end after errors": (
        "engine/test_generate.py",
        "test_an_unusable_checkpoint_ends_the_task_with_one_sentence",
    ),
    "9 states": ("unit/test_lifecycle.py", "test_progress_never_falls"),
    "10 filter": ("engine/test_guidance.py", "test_filter_of_a_128_latent_stays_under_200_mb"),
    "10 tiles": ("engine/test_decode.py", "test_latents_of_256_by_256_are_decoded_in_tiles"),
}


def _words(name: str) -> tuple[str, ...]:
    return WORDS.get(name, ())


def test_g1_lines_and_lora_tags() -> None:
    chosen = (LoraChoice("None", 1), LoraChoice("ui.safetensors", 0.3))
    scan = take_lora_tags("a <lora:foo:0.8> cat, <lora:bar:-.5><lora:nope:1>, x", FILES)
    combined, _ = add_tagged_loras(chosen, scan.found, 5)

    assert take_lora_tags("a cat,dog", FILES).text == "a cat, dog"
    assert take_lora_tags("  a   cat ,, dog ,", FILES).text == "a cat, dog"
    assert scan.text == "a cat, x"
    assert [(choice.file, choice.weight) for choice in combined] == [
        ("ui.safetensors", 0.3),
        ("foo.safetensors", 0.8),
        ("sub/bar.safetensors", -0.5),
    ]
    foo = (LoraChoice("foo.safetensors", 0.1),)
    assert add_tagged_loras(foo, take_lora_tags("x <lora:foo:0.8>", FILES).found, 5)[0] == foo
    assert clean_line("  , a   b. ,") == "a b"


@pytest.mark.parametrize(
    ("seed", "filled"),
    [
        (0, "a green and green cat blue dog missing"),
        (1, "a red and blue cat red dog missing"),
        (12345, "a green and blue cat green cat missing"),
    ],
)
def test_g2_wildcards(seed: int, filled: str) -> None:
    text = "a __color__ and __color__ __animal__ __combo__ __missing__"

    assert fill_wildcards(text, _words, random.Random(seed)) == filled


def test_g2_wildcards_in_order() -> None:
    text = "a __color__ and __color__ __animal__ __combo__"

    assert [fill_wildcards(text, _words, random.Random(0), in_order=index) for index in range(4)] == [
        "a red and red cat red cat",
        "a green and green dog green dog",
        "a blue and blue cat blue cat",
        "a red and red dog red dog",
    ]


def test_g3_arrays() -> None:
    assert [choose_elements("[[a,b,c]] x [[1,2]]", index) for index in range(7)] == [
        *("a x 1", "b x 1", "c x 1", "a x 2", "b x 2", "c x 2", "a x 1"),
    ]
    assert [choose_elements("[[red, green]] ball", index) for index in range(2)] == ["red ball", " green ball"]


@pytest.mark.parametrize("item", SHOWN_BY)
def test_every_item_has_its_test(item: str) -> None:
    file, name = SHOWN_BY[item]

    assert name in _functions(TESTS / file)


@cache
def _functions(path: Path) -> frozenset[str]:
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
