"""Requests: what clients may send, what is refused, and that a stored request reproduces itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modules.choices import (
    ImageTab,
    MetadataScheme,
    OutputFormat,
    Performance,
    SamplerName,
    SchedulerName,
    UovMethod,
)
from modules.params import PAGE_GROUPS, Lora, ParamGroup, parse_size, ui_of
from modules.request import (
    GenerationRequest,
    from_params,
    normalised,
    tab_of,
    to_params,
    with_resolved_seed,
)


def parse(**sent: object) -> GenerationRequest:
    return GenerationRequest.model_validate(sent)


@pytest.mark.parametrize(
    "text", ["1152*896", "1152x896", "1152X896", "1152×896", " 1152 × 896 ", '1152×896 <span style="x">']
)
def test_sizes_are_read_in_every_spelling(text: str) -> None:
    assert parse(aspect_ratios_selection=text).aspect_ratios_selection == "1152*896"


@pytest.mark.parametrize("text", ["", "big", "1152", "1152*", "*896", "0*0", "63*64", "99999*64", "1152*896*3"])
def test_other_sizes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValidationError, match=r"1152\*896"):
        parse(aspect_ratios_selection=text)


@pytest.mark.parametrize(
    ("sent", "seed"),
    [
        ("123", 123),
        (123, 123),
        (123.0, 123),
        (2**63 - 1, 2**63 - 1),
        (-1, -1),
        (-5, -1),
        (2**63, -1),
        ("", -1),
        (None, -1),
    ],
)
def test_seeds_are_read_as_clients_send_them(sent: object, seed: int) -> None:
    assert parse(image_seed=sent).image_seed == seed


@pytest.mark.parametrize("sent", ["abc", 1.5, [], {}])
def test_a_seed_that_is_no_number_is_refused(sent: object) -> None:
    with pytest.raises(ValidationError, match="image_seed"):
        parse(image_seed=sent)


@pytest.mark.parametrize("word", [None, "", "None", "none", "null", "string"])
def test_every_spelling_of_no_image_means_no_image(word: str | None) -> None:
    request = parse(
        uov_input_image=word, inpaint_input_image=word, enhance_input_image=word, controlnet_image=[{"cn_img": word}]
    )
    assert not request.has_input_images


@pytest.mark.parametrize("word", ["disable", "disabled", "Disabled", "DISABLE"])
def test_disabled_is_accepted_in_any_case(word: str) -> None:
    assert parse(uov_method=word).uov_method is UovMethod.DISABLED


@pytest.mark.parametrize(
    ("word", "truth"),
    [
        ("true", True),
        ("1", True),
        ("yes", True),
        ("on", True),
        ("false", False),
        ("0", False),
        ("no", False),
        ("off", False),
    ],
)
def test_booleans_may_be_words(word: str, truth: bool) -> None:
    assert parse(stream_output=word).stream_output is truth


def test_names_of_both_generations_of_clients_are_understood() -> None:
    request = parse(metadata_scheme="a111", output_format="JPG")
    assert (request.metadata_scheme, request.output_format) == (MetadataScheme.A1111, OutputFormat.JPG)


def test_a_single_lora_or_image_prompt_is_a_list_of_one() -> None:
    request = parse(loras={"model_name": "a.safetensors"}, controlnet_image={"cn_type": "CPDS"})
    assert request.loras == (Lora(model_name="a.safetensors"),)
    assert len(request.controlnet_image) == 1


@pytest.mark.parametrize(
    ("kind", "stop", "weight"),
    [("ImagePrompt", 0.5, 0.6), ("FaceSwap", 0.9, 0.75), ("PyraCanny", 0.5, 1.0), ("CPDS", 0.5, 1.0)],
)
def test_a_null_stop_or_weight_means_the_default_of_the_type(kind: str, stop: float, weight: float) -> None:
    prompt = parse(controlnet_image=[{"cn_type": kind, "cn_stop": None, "cn_weight": None}]).controlnet_image[0]
    assert (prompt.cn_stop, prompt.cn_weight) == (stop, weight)
    absent = parse(controlnet_image=[{"cn_type": kind}]).controlnet_image[0]
    assert (absent.cn_stop, absent.cn_weight) == (0.6, 0.5)


def test_the_word_none_is_no_additional_prompt() -> None:
    assert parse(inpaint_additional_prompt="None").inpaint_additional_prompt == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_number", 0),
        ("image_number", 33),
        ("sharpness", 31),
        ("guidance_scale", 0.5),
        ("clip_skip", 13),
        ("overwrite_width", 2049),
        ("prompt", 3),
        ("loras", [{"weight": 3}]),
        ("sharpness", float("nan")),
        ("output_format", "gif"),
        ("performance_selection", "Fast"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_a_random_seed_survives_javascript() -> None:
    seeds = {with_resolved_seed(parse()).image_seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_a_given_seed_is_kept() -> None:
    assert with_resolved_seed(parse(image_seed=7)).image_seed == 7


@pytest.mark.parametrize(
    ("sent", "tab"),
    [
        ({}, ImageTab.UOV),
        ({"inpaint_input_image": "x"}, ImageTab.INPAINT),
        ({"uov_input_image": "x", "inpaint_input_image": "x"}, ImageTab.UOV),
        ({"controlnet_image": [{}, {}, {"cn_img": "x"}], "uov_input_image": "x"}, ImageTab.IMAGE_PROMPT),
        ({"enhance_input_image": "x", "controlnet_image": [{"cn_img": "x"}]}, ImageTab.ENHANCE),
        ({"current_tab": "inpaint"}, ImageTab.INPAINT),
    ],
)
def test_the_images_decide_the_tab(sent: dict[str, object], tab: ImageTab) -> None:
    assert tab_of(parse(**sent)) is tab


def test_a_stored_request_has_padded_lists_and_forced_switches() -> None:
    stored = to_params(normalised(parse(invert_mask_checkbox=True, outpaint_distance=[-1, 5])))
    assert len(stored["controlnet_image"]) == 4
    assert len(stored["enhance_ctrls"]) == 3
    assert stored["outpaint_distance"] == [0, 5, 0, 0]
    assert stored["input_image_checkbox"] is True
    assert stored["invert_mask_checkbox"] is False


requests = st.builds(
    lambda **sent: parse(**sent),
    prompt=st.text(max_size=50),
    style_selections=st.lists(st.text(max_size=10), max_size=3),
    performance_selection=st.sampled_from(Performance),
    aspect_ratios_selection=st.tuples(st.integers(64, 4096), st.integers(64, 4096)).map(
        lambda size: f"{size[0]}×{size[1]}"
    ),
    image_number=st.integers(1, 32),
    image_seed=st.integers(-2, 2**64),
    sampler_name=st.sampled_from(SamplerName),
    scheduler_name=st.sampled_from(SchedulerName),
    guidance_scale=st.floats(1, 30),
    overwrite_switch=st.floats(-1, 200),
    loras=st.lists(
        st.builds(dict, enabled=st.booleans(), model_name=st.text(max_size=8), weight=st.floats(-2, 2)), max_size=6
    ),
)


@given(requests)
def test_posting_a_stored_request_again_gives_the_same_request(request: GenerationRequest) -> None:
    stored = to_params(with_resolved_seed(normalised(request)))
    again = normalised(from_params(stored))
    assert to_params(again) == stored


@given(st.integers(64, 8192), st.integers(64, 8192), st.sampled_from("*xX×"))
def test_parse_size_reads_what_is_written(width: int, height: int, sign: str) -> None:
    assert parse_size(f"{width}{sign}{height}") == (width, height)


def test_every_field_is_declared_once_with_title_and_description() -> None:
    declared = [name for group in PAGE_GROUPS for name in group.__annotations__ if name != "label"]
    assert len(declared) == len(set(declared))
    for name, field in GenerationRequest.model_fields.items():
        assert field.title, name
        assert field.description, name


def test_every_field_of_a_page_group_says_where_it_is_shown() -> None:
    hidden = {
        "input_image_checkbox",
        "current_tab",
        "inpaint_mask_upload_checkbox",
        "inpaint_advanced_masking_checkbox",
        "invert_mask_checkbox",
    }
    for group in PAGE_GROUPS:
        assert issubclass(group, ParamGroup)
        for name in group.__annotations__:
            if name != "label":
                assert (ui_of(group, name).place == "") == (name in hidden), name
