"""What becomes of a prompt: lines, tags, wildcards, arrays, styles."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import UnknownName
from modules.prompts import (
    MAX_EXPANDED_CHARS,
    ImagePrompt,
    LoraChoice,
    PromptSources,
    PromptTask,
    add_tagged_loras,
    array_combinations,
    choose_elements,
    clean_line,
    fill_wildcards,
    lora_stems,
    prepare_image_prompt,
    split_lines,
    take_lora_tags,
    tidy_commas,
)
from modules.styles import StyleTable, StyleTemplate

FILES = lora_stems(["foo.safetensors", "sub/bar.safetensors", "ui.safetensors"])
WORDS = {
    "color": ("red", "green", "blue"),
    "animal": ("cat", "dog"),
    "combo": ("__color__ __animal__",),
    "self": ("__self__ __self__",),
    "mood": ("foo", "bar"),
    "tagged": ("<lora:foo:0.5> misty", "<lora:bar:0.25> sunny"),
}
STYLES = StyleTable(
    (
        StyleTemplate("Frame", "etching of {prompt}, fine lines", "blurry"),
        StyleTemplate("Fragment", "warm light\nfilm grain", "flat\ndull"),
        StyleTemplate("Avoid", "", "ugly"),
    )
)


def words(name: str) -> tuple[str, ...]:
    return WORDS.get(name, ())


def sources(**changes) -> PromptSources:
    given = {
        "styles": STYLES,
        "words": words,
        "lora_files": FILES,
        "expand": lambda text, seed: f"{text}, {seed}",
    }
    return PromptSources(**{**given, **changes})


def prepare(prompt: str, *, index: int = 0, seed: int = 0, **task) -> ImagePrompt:
    return prepare_image_prompt(PromptTask(prompt, **task), sources(), index=index, seed=seed)


def test_clean_line_makes_runs_of_spaces_one_and_cuts_both_ends():
    assert clean_line("  , a   b. ,") == "a b"


def test_lines_are_cleaned_and_empty_ones_dropped():
    assert split_lines("a cat.\r\n\n  ,\n with  hat ,") == ["a cat", "with hat"]
    assert split_lines(" \n,") == [""]


@pytest.mark.parametrize(("typed", "tidy"), [("a cat,dog", "a cat, dog"), ("  a   cat ,, dog ,", "a cat, dog")])
def test_commas_are_tidied_also_without_tags(typed, tidy):
    assert take_lora_tags(typed, FILES).text == tidy


def test_tags_are_taken_out_and_looked_up_by_stem():
    scan = take_lora_tags("a <lora:foo:0.8> cat, <lora:bar:-.5><lora:nope:1>, x", FILES)
    assert scan.text == "a cat, x"
    assert scan.found == (LoraChoice("foo.safetensors", 0.8), LoraChoice("sub/bar.safetensors", -0.5))
    assert scan.unknown == ("nope",)


def test_tagged_loras_follow_the_chosen_ones_without_empty_slots():
    chosen = (LoraChoice("None", 1), LoraChoice("ui.safetensors", 0.3))
    tagged = take_lora_tags("a <lora:foo:0.8> cat, <lora:bar:-.5>", FILES).found
    combined, added = add_tagged_loras(chosen, tagged, 5)
    assert [(choice.file, choice.weight) for choice in combined] == [
        ("ui.safetensors", 0.3), ("foo.safetensors", 0.8), ("sub/bar.safetensors", -0.5),
    ]  # fmt: skip
    assert added == tagged


def test_a_chosen_lora_keeps_its_weight_and_the_list_stays_untouched():
    chosen = (LoraChoice("None", 1), LoraChoice("foo.safetensors", 0.1))
    image = prepare("x <lora:foo:0.8>", loras=chosen)
    assert image.positive_texts == ("x",)
    assert image.loras == chosen
    assert image.tagged_loras == ()


def test_tags_fill_only_the_slots_that_are_left():
    image = prepare("<lora:foo:1> <lora:bar:1> x", loras=(LoraChoice("ui.safetensors", 1),), max_loras=2)
    assert [choice.file for choice in image.loras] == ["ui.safetensors", "foo.safetensors"]
    assert [choice.file for choice in image.tagged_loras] == ["foo.safetensors"]


def test_a_hidden_lora_cannot_be_tagged():
    stems = lora_stems(["fast.safetensors", r"deep\x.y.safetensors"], hidden={"fast.safetensors"})
    assert stems == {"x.y": r"deep\x.y.safetensors"}


def test_tags_count_in_the_main_positive_line_only():
    image = prepare("x\n<lora:foo:1> y", negative_prompt="<lora:bar:1> z")
    assert image.loras == ()
    assert image.positive_texts == ("x", "<lora:foo:1> y")
    assert image.negative_texts == ("<lora:bar:1> z",)


def test_a_tag_in_an_array_belongs_to_the_image_that_takes_its_element():
    images = [prepare("[[<lora:foo:1> fox, <lora:bar:0.5> cat, hen]] in snow", index=index) for index in range(3)]
    assert [image.positive_texts for image in images] == [
        ("fox in snow",),
        ("cat in snow",),
        (" hen in snow",),
    ]
    assert [[choice.file for choice in image.loras] for image in images] == [
        ["foo.safetensors"], ["sub/bar.safetensors"], [],
    ]  # fmt: skip


def test_a_tag_from_a_wildcard_belongs_to_the_image_that_draws_its_line():
    images = [prepare("__tagged__ hill", index=index, wildcards_in_order=True) for index in range(2)]
    assert [image.positive_texts for image in images] == [("misty hill",), ("sunny hill",)]
    assert [image.loras for image in images] == [
        (LoraChoice("foo.safetensors", 0.5),), (LoraChoice("sub/bar.safetensors", 0.25),),
    ]  # fmt: skip


def test_a_wildcard_can_name_the_lora():
    image = prepare("x <lora:__mood__:0.7>", index=1, wildcards_in_order=True)
    assert image.loras == (LoraChoice("sub/bar.safetensors", 0.7),)
    assert image.positive_texts == ("x",)


@pytest.mark.parametrize(
    ("seed", "filled"),
    [
        (0, "a green and green cat blue dog missing"),
        (1, "a red and blue cat red dog missing"),
        (12345, "a green and blue cat green cat missing"),
    ],
)
def test_wildcards_are_drawn_as_fooocus_draws_them(seed, filled):
    text = "a __color__ and __color__ __animal__ __combo__ __missing__"
    assert fill_wildcards(text, words, random.Random(seed)) == filled


def test_wildcards_in_order_take_the_line_of_the_image():
    text = "a __color__ and __color__ __animal__ __combo__"
    filled = [fill_wildcards(text, words, random.Random(0), in_order=index) for index in range(4)]
    assert filled == [
        "a red and red cat red cat", "a green and green dog green dog",
        "a blue and blue cat blue cat", "a red and red dog red dog",
    ]  # fmt: skip


def test_wildcards_that_name_themselves_come_to_an_end():
    text = fill_wildcards("__self__", words, random.Random(0))
    assert len(text) <= MAX_EXPANDED_CHARS


def test_arrays_change_the_first_one_fastest_and_start_again():
    texts = [choose_elements("[[a,b,c]] x [[1,2]]", index) for index in range(7)]
    assert texts == ["a x 1", "b x 1", "c x 1", "a x 2", "b x 2", "c x 2", "a x 1"]
    assert array_combinations("[[a,b,c]] x [[1,2]]\n[[e,f]]") == 6


def test_array_elements_keep_the_space_after_the_comma():
    assert [prepare("[[red, green]] ball", index=index).prompt for index in range(2)] == [
        "red ball",
        " green ball",
    ]


def test_arrays_stay_in_extra_and_negative_lines():
    image = prepare("x\n[[a, b]]", negative_prompt="[[c, d]]")
    assert image.prompt == "x\n[[a, b]]"
    assert image.negative_prompt == "[[c, d]]"


def test_random_numbers_are_used_in_the_documented_order():
    image = prepare(
        "__color__\n__animal__",
        negative_prompt="__color__\n__animal__",
        seed=7,
        styles=("Random Style", "Random Style"),
    )
    rng = random.Random(7)
    main, negative = rng.choice(WORDS["color"]), rng.choice(WORDS["color"])
    extra, negative_extra = rng.choice(WORDS["animal"]), rng.choice(WORDS["animal"])
    assert image.prompt == f"{main}\n{extra}"
    assert image.negative_prompt == f"{negative}\n{negative_extra}"
    assert image.styles == tuple(rng.choice(STYLES.templates).name for _ in range(2))


def test_a_template_with_a_place_for_the_prompt_takes_it_in():
    image = prepare("fox\nin snow", negative_prompt="text\nlogo", styles=("Fragment", "Frame"))
    assert image.positive_texts == ("warm light", "film grain", "etching of fox, fine lines", "in snow")
    assert image.negative_texts == ("flat", "dull", "blurry", "text", "logo")
    assert (image.positive_pooled, image.negative_pooled) == (4, 5)


def test_the_main_line_comes_first_when_no_template_has_a_place_for_it():
    image = prepare("fox\nin snow", styles=("Fragment", "Avoid"))
    assert image.positive_texts == ("fox", "warm light", "film grain", "in snow")
    assert image.negative_texts == ("flat", "dull", "ugly")


def test_there_is_always_one_text_to_encode():
    image = prepare("", styles=("Avoid",))
    assert image.positive_texts == ("",)
    assert (prepare("").positive_pooled, prepare("").negative_pooled) == (1, 1)


def test_the_expansion_is_the_last_text_and_does_not_count_for_pooling():
    image = prepare("fox\nin snow", seed=5, styles=("Fragment", "Fooocus V2"))
    assert image.positive_texts == ("fox", "warm light", "film grain", "in snow", "fox, 5")
    assert image.positive_pooled == 4
    assert image.expansion == "fox, 5"
    assert image.styles == ("Fooocus V2", "Fragment")


def test_an_empty_main_line_turns_the_expansion_off():
    image = prepare("", styles=("Fooocus V2", "Avoid"))
    assert image.expansion == ""
    assert image.styles == ("Avoid",)


def test_styles_are_recorded_in_their_listed_spelling():
    image = prepare("fox", styles=("fooocus-v2", "frame"))
    assert image.styles == ("Fooocus V2", "Frame")


def test_an_unknown_style_is_an_error_with_near_matches():
    with pytest.raises(UnknownName) as caught:
        prepare("x", styles=("Framee",))
    assert caught.value.near[0] == "Frame"


LINES = st.text(alphabet="ab ,.()[]_:<>\n\r0-é", max_size=40)


@given(
    prompt=LINES,
    negative=LINES,
    seed=st.integers(0, 2**63 - 1),
    index=st.integers(0, 40),
    in_order=st.booleans(),
)
def test_the_same_seed_gives_the_same_text_whatever_is_typed(prompt, negative, seed, index, in_order):
    task = PromptTask(prompt, negative, ("Fooocus V2", "Random Style"), wildcards_in_order=in_order)
    first = prepare_image_prompt(task, sources(), index=index, seed=seed)
    assert first == prepare_image_prompt(task, sources(), index=index, seed=seed)
    assert first.positive_pooled + bool(first.expansion) == len(first.positive_texts)
    assert first.negative_pooled == len(first.negative_texts) >= 1


@given(st.lists(st.lists(st.text("abc", min_size=1), min_size=1, max_size=4, unique=True), min_size=1, max_size=3))
def test_every_combination_of_arrays_comes_once(arrays):
    text = " ".join(f"[[{','.join(elements)}]]" for elements in arrays)
    total = array_combinations(text)
    texts = {choose_elements(text, index) for index in range(total)}
    assert len(texts) == total
    assert choose_elements(text, total) == choose_elements(text, 0)


@given(LINES)
def test_cleaning_and_tidying_twice_changes_nothing_more(text):
    assert clean_line(clean_line(text)) == clean_line(text)
    assert tidy_commas(tidy_commas(text)) == tidy_commas(text)


@given(st.text(alphabet="ab,[]", max_size=30))
def test_a_line_without_tags_only_has_its_commas_tidied(line):
    scan = take_lora_tags(line, FILES)
    assert scan.text == tidy_commas(line)
    assert scan.found == ()
