"""The request fields of Fooocus-API v1 and v2, turned into those of a generate call."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Values: TypeAlias = dict[str, Any]

RENAMED: Mapping[str, str] = {
    "input_mask": "inpaint_mask_image_upload",
    "upscale_value": "upscale_multiple",
    "save_meta": "save_metadata_to_images",
    "meta_scheme": "metadata_scheme",
    "save_extension": "output_format",
    "enhance_ctrlnets": "enhance_ctrls",
    "image_prompts": "controlnet_image",
}
SIDES = ("left", "right", "top", "bottom")
OUTPAINT_KEYS = tuple(f"outpaint_distance_{side}" for side in SIDES)
_COMMA_LISTS = ("style_selections", "outpaint_selections")
_JSON_TEXTS = ("loras", "advanced_params", "image_prompts", "enhance_ctrlnets")
_PROMPT_PARTS = ("cn_img", "cn_stop", "cn_weight", "cn_type")
_SLOTS = (1, 2, 3, 4)
_PASSES = (1, 2, 3)
_PASS_PREFIXES = ("enhance_mask_", "enhance_inpaint_", "enhance_enabled", "enhance_prompt", "enhance_negative_prompt")


def text_to_image(values: Values) -> Values:
    """The fields of `text-to-image` and `text-to-image-with-ip`."""
    return common(values)


def upscale_vary(values: Values) -> Values:
    """The fields of `image-upscale-vary`; with image prompts both are used."""
    made = common({"uov_method": "Upscale (2x)", **values})
    made["uov_input_image"] = made.pop("input_image", None)
    if has_prompts(made):
        made["mixing_image_prompt_and_vary_upscale"] = True
    return made


def inpaint_outpaint(values: Values) -> Values:
    """The fields of `image-inpaint-outpaint`; with image prompts both are used."""
    made = common(values)
    made["inpaint_input_image"] = made.pop("input_image", None)
    if has_prompts(made):
        made["mixing_image_prompt_and_inpaint"] = True
    return made


def image_prompt(values: Values) -> Values:
    """The fields of `image-prompt`; a picture to repaint may come with it."""
    made = common(values)
    picture = made.pop("input_image", None)
    if picture:
        made["inpaint_input_image"] = picture
        made["mixing_image_prompt_and_inpaint"] = True
    return made


def enhance_form(values: Values) -> Values:
    """The fields of the `image-enhance` form."""
    return common(values)


def enhance_json(values: Values) -> Values:
    """The fields of `image-enhance` as JSON, whose defaults differ."""
    passes = values.get("enhance_ctrlnets")
    if isinstance(passes, list):
        values = {**values, "enhance_ctrlnets": [_with_face(one) for one in passes]}
    return common(
        {
            "enhance_checkbox": True,
            "enhance_uov_method": "Vary (Strong)",
            "save_final_enhanced_image_only": True,
            **values,
        }
    )


def _with_face(one: object) -> object:
    return {"enhance_mask_dino_prompt": "face", **one} if isinstance(one, dict) else one


def common(values: Values) -> Values:
    """What all old endpoints share: one level less, other names, lists in place of numbered fields."""
    made = {**_advanced(values.get("advanced_params")), **values}
    made.pop("advanced_params", None)
    made.setdefault("inpaint_respective_field", 1.0)
    if any(key in made for key in OUTPAINT_KEYS):
        left, right, top, bottom = (_distance(made.pop(key, 0)) for key in OUTPAINT_KEYS)
        made["outpaint_distance"] = [left, top, right, bottom]
    if isinstance(prompts := made.get("image_prompts"), list):
        made["image_prompts"] = [_prompt(one) for one in prompts]
    for old, new in RENAMED.items():
        if old in made:
            value = made.pop(old)
            if value is not None:
                made[new] = value
    return {key: value for key, value in made.items() if value is not None or key.endswith("image")}


def _advanced(group: object) -> Values:
    """The group `advanced_params`, moved up; its mask switch says nothing."""
    if not isinstance(group, dict):
        return {}
    return {key: value for key, value in group.items() if key != "inpaint_mask_upload_checkbox"}


def _distance(value: object) -> object:
    """-1 was the old word for "the default"."""
    try:
        return max(0, int(float(value)))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return value


def _prompt(one: object) -> object:
    """An image prompt; a stop or weight of 0 meant the default of its type."""
    if not isinstance(one, dict):
        return one
    return {**one, **{key: _none_if_zero(one.get(key)) for key in ("cn_stop", "cn_weight")}}


def _none_if_zero(value: object) -> object:
    return None if value in (0, "", "0", "0.0") else value


def has_prompts(made: Mapping[str, Any]) -> bool:
    """True when at least one image prompt has a picture."""
    prompts = made.get("controlnet_image")
    return isinstance(prompts, list) and any(isinstance(one, dict) and one.get("cn_img") for one in prompts)


# -- forms ----------------------------------------------------------------------------------------------------------


def from_form(fields: Mapping[str, str]) -> Values:
    """Text fields of a form as the JSON call has them; empty fields count as not sent."""
    values: Values = {"save_meta": "false"}
    for key, text in fields.items():
        if text == "" and key not in ("prompt", "negative_prompt"):
            continue
        values[key] = _FORM_READERS.get(key, _as_is)(text)
    prompts = [_numbered(values, _PROMPT_PARTS, number, "") for number in _SLOTS]
    if any(prompts):
        values["image_prompts"] = [one for one in prompts if one]
    passes = [_numbered_pass(values, number) for number in _PASSES]
    if any(passes):
        values["enhance_ctrlnets"] = passes
    return {key: value for key, value in values.items() if value is not None}


def _numbered(values: Values, names: tuple[str, ...], number: int, joint: str) -> Values:
    """The fields `name{number}`, taken out and without their number."""
    return {name: values.pop(key) for name in names if (key := f"{name}{joint}{number}") in values}


def _numbered_pass(values: Values, number: int) -> Values:
    """One enhancement pass from its fields `…_{number}`."""
    suffix = f"_{number}"
    keys = [key for key in values if key.endswith(suffix) and key.startswith(_PASS_PREFIXES)]
    return {key.removesuffix(suffix): values.pop(key) for key in keys}


def _as_is(text: str) -> object:
    return text


def _comma_list(text: str) -> object:
    return [part.strip() for part in text.split(",") if part.strip()]


def _json_text(text: str) -> object:
    """The value of a JSON text; broken text silently means the defaults, as it always did."""
    try:
        value: object = json.loads(text)
    except ValueError:
        return None
    return value


_FORM_READERS: Mapping[str, Callable[[str], object]] = {
    **dict.fromkeys(_COMMA_LISTS, _comma_list),
    **dict.fromkeys(_JSON_TEXTS, _json_text),
}
