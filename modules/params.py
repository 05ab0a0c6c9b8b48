"""Every generation parameter, declared once, in the class of its group on the page.

Page, REST model, validation, presets, metadata and docs follow from these declarations. Field names are the wire names
of the API; `plan.py` turns them into the terms of the field.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from modules.choices import (
    DEFAULT_VAE,
    MAX_SEED,
    NO_MODEL,
    STOP_AND_WEIGHT_BY_TYPE,
    STYLE_EXPANSION,
    ClothCategory,
    ControlType,
    EnhanceOrder,
    EnhancePrompt,
    ImageTab,
    InpaintEngine,
    MaskModel,
    MetadataScheme,
    OutpaintDirection,
    OutputFormat,
    Performance,
    RefinerSwapMethod,
    SamModel,
    SamplerName,
    SchedulerName,
    UovMethod,
)


@dataclass(frozen=True, slots=True)
class Ui:
    """How a parameter is shown on the page and where it stands.

    step: slider step; None for the type's own.
    lines: text box height.
    place: name of the tab or panel that holds the widget; "" keeps it off the page.
    works: False while the parameter is accepted and stored but changes no picture (docs/status.md lists these).
    """

    step: float | None = None
    lines: int = 1
    place: str = ""
    works: bool = True


NO_IMAGE_WORDS = frozenset({"", "none", "null", "string"})


def is_no_image(value: object) -> bool:
    """True for every spelling of "no image" that clients send ("string" is the docs page's sample value)."""
    return value is None or (isinstance(value, str) and value.strip().casefold() in NO_IMAGE_WORDS)


def _wrap_single(value: object) -> object:
    return [value] if isinstance(value, Mapping | BaseModel) else value


def _none_to_empty(value: object) -> object:
    return "" if value is None else value


def _image_text(value: object) -> object:
    return "" if is_no_image(value) else value


def _uov_method(value: object) -> object:
    if not isinstance(value, str):
        return value
    folded = value.strip().casefold()
    if folded in ("disable", "disabled", ""):
        return UovMethod.DISABLED
    return next((method for method in UovMethod if method.casefold() == folded), value)


def _output_format(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _metadata_scheme(value: object) -> object:
    if isinstance(value, str):
        value = value.strip().lower()
        return "a1111" if value == "a111" else value
    return value


def _model_name(value: object) -> object:
    return NO_MODEL if value is None or value == "" else value


def _seed(value: object) -> object:
    """Read a seed as clients send it; whatever is no integer in range means "random" (-1)."""
    if value is None or value == "":
        return -1
    try:
        number = int(value) if not isinstance(value, float) else int(value) if value.is_integer() else None  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return value
    if number is None:
        return value
    return number if 0 <= number <= MAX_SEED else -1


_SIZE = re.compile(r"^\s*(\d{1,5})\s*[*xX×]\s*(\d{1,5})(?:\s.*)?$", re.DOTALL)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels from `1152*896`, with `*`, `x`, `X` or `×`; a label after a space is ignored.

    Raises:
        ValueError: not two positive integers.
    """
    match = _SIZE.match(text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (64 <= width <= 8192 and 64 <= height <= 8192):
        raise ValueError(f"{text!r} is not a size such as '1152*896' with sides of 64 to 8192 pixels")
    return width, height


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    width, height = parse_size(value)
    return f"{width}*{height}"


ImageText = Annotated[str, BeforeValidator(_image_text)]
ModelName = Annotated[str, BeforeValidator(_model_name)]
UovMethodField = Annotated[UovMethod, BeforeValidator(_uov_method)]


class ParamGroup(BaseModel):
    """Base of all parameter groups; `label` is the group's heading on the page and in docs."""

    # Validators are built at first use: a server that only starts needs none of the groups' own.
    model_config = ConfigDict(frozen=True, extra="ignore", use_enum_values=False, allow_inf_nan=False, defer_build=True)
    label: ClassVar[str] = ""

    def __init_subclass__(cls, label: str = "") -> None:
        super().__init_subclass__()
        if label:
            cls.label = label


class Lora(ParamGroup, label="LoRA"):
    """One LoRA row: a small set of weight changes merged into the model."""

    enabled: bool = Field(False, title="Enable", description="Use this row.")
    model_name: ModelName = Field(NO_MODEL, title="LoRA", description="File name from the list of LoRAs, or `None`.")
    weight: float = Field(0.5, ge=-2, le=2, title="Weight", description="Strength of the change; negative inverts it.")

    @property
    def is_active(self) -> bool:
        """True when this row changes the model."""
        return self.enabled and self.model_name != NO_MODEL


class ImagePrompt(ParamGroup, label="Image Prompt"):
    """One picture that guides the run."""

    cn_img: ImageText = Field("", title="Image", description="Picture that guides the run; empty for none.")
    cn_stop: float = Field(
        0.6, ge=0, le=1, title="Stop At", description="Share of the run after which the picture no longer guides."
    )
    cn_weight: float = Field(0.5, ge=0, le=2, title="Weight", description="How strongly the picture guides.")
    cn_type: ControlType = Field(ControlType.IMAGE_PROMPT, title="Type", description="What of the picture guides.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_type(cls, data: object) -> object:
        """A stop or weight of null means the default of the type (an absent key means the field's own default)."""
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        kind = filled.get("cn_type", ControlType.IMAGE_PROMPT)
        if isinstance(kind, str) and kind in STOP_AND_WEIGHT_BY_TYPE:
            stop, weight = STOP_AND_WEIGHT_BY_TYPE[ControlType(kind)]
            for key, value in (("cn_stop", stop), ("cn_weight", weight)):
                if key in filled and filled[key] is None:
                    filled[key] = value
        return filled


class EnhanceCtrl(ParamGroup, label="Enhance"):
    """One enhancement pass: find a region by words, repaint it."""

    enhance_enabled: bool = Field(False, title="Enable", description="Use this pass.")
    enhance_mask_dino_prompt: str = Field("", title="Detection prompt", description="What to find, in singular nouns.")
    enhance_prompt: str = Field("", title="Enhancement positive prompt", description="Empty: the main prompt.")
    enhance_negative_prompt: str = Field(
        "", title="Enhancement negative prompt", description="Empty: the main negative prompt."
    )
    enhance_mask_model: MaskModel = Field(
        MaskModel.SAM, title="Mask generation model", description="Model that finds the region."
    )
    enhance_mask_cloth_category: ClothCategory = Field(
        ClothCategory.FULL, title="Cloth category", description="Part selected by the cloth model."
    )
    enhance_mask_sam_model: SamModel = Field(SamModel.VIT_B, title="SAM model", description="Size of the SAM model.")
    enhance_mask_text_threshold: float = Field(
        0.25, ge=0, le=1, title="Text Threshold", description="Least score of a word of the detection prompt."
    )
    enhance_mask_box_threshold: float = Field(
        0.3, ge=0, le=1, title="Box Threshold", description="Least score of a detected box."
    )
    enhance_mask_sam_max_detections: int = Field(
        0, ge=0, le=10, title="Maximum number of detections", description="0 for all."
    )
    enhance_inpaint_disable_initial_latent: bool = Field(
        False, title="Disable initial latent in inpaint", description="Start the region from pure noise."
    )
    enhance_inpaint_engine: InpaintEngine = Field(
        InpaintEngine.V26, title="Inpaint Engine", description="Version of the inpaint patch."
    )
    enhance_inpaint_strength: float = Field(
        1.0, ge=0, le=1, title="Inpaint Denoising Strength", description="Share of the schedule run on the region."
    )
    enhance_inpaint_respective_field: float = Field(
        0.618, ge=0, le=1, title="Inpaint Respective Field", description="0: the region only, 1: the whole picture."
    )
    enhance_inpaint_erode_or_dilate: float = Field(
        0, ge=-64, le=64, title="Mask Erode or Dilate", description="Pixels by which the mask shrinks or grows."
    )
    enhance_mask_invert: bool = Field(False, title="Invert Mask", description="Repaint everything but the region.")


def _wrapped_list(item: type[ParamGroup]) -> Any:  # noqa: ANN401 - an annotation made at run time
    return Annotated[tuple[item, ...], BeforeValidator(_wrap_single)]  # type: ignore[valid-type]


class PromptParams(ParamGroup, label="Prompt"):
    """What the picture should show."""

    prompt: Annotated[str, Ui(lines=3, place="prompt")] = Field(
        "",
        title="Prompt",
        max_length=100_000,
        description="What the picture should show. The first line is the main prompt; further lines are extra prompts.",
    )
    negative_prompt: Annotated[str, Ui(lines=2, place="Settings")] = Field(
        "",
        title="Negative Prompt",
        max_length=100_000,
        description="What the picture should not show; the same line rule.",
    )
    style_selections: Annotated[tuple[str, ...], Ui(place="Styles")] = Field(
        (STYLE_EXPANSION, "Fooocus Enhance", "Fooocus Sharp"),
        title="Styles",
        description="Style templates around the prompt, in order; an empty list uses none.",
    )


class SettingsParams(ParamGroup, label="Settings"):
    """Size, number, format and seed."""

    performance_selection: Annotated[Performance, Ui(place="Settings")] = Field(
        Performance.SPEED,
        title="Performance",
        description="Steps per picture: 60, 30, 8, 4 or 4. The last three force sampler and guidance and add a LoRA.",
    )
    aspect_ratios_selection: Annotated[str, BeforeValidator(_size), Ui(place="Settings")] = Field(
        "1152*896",
        title="Aspect Ratios",
        description="Width and height in pixels, `W*H`. Demo models scale it to the size they were trained on; the "
        "built-in one draws a square in place of the default.",
    )
    image_number: Annotated[int, Ui(step=1, place="Settings")] = Field(
        1, ge=1, le=32, title="Image Number", description="How many pictures to make."
    )
    output_format: Annotated[OutputFormat, BeforeValidator(_output_format), Ui(place="Settings")] = Field(
        OutputFormat.PNG, title="Output Format", description="File format of the results."
    )
    image_seed: Annotated[int, BeforeValidator(_seed), Ui(place="Settings")] = Field(
        -1,
        ge=-1,
        le=MAX_SEED,
        title="Seed",
        description="Start of the random numbers; picture i uses seed + i. -1 or out of range draws one.",
    )
    read_wildcards_in_order: Annotated[bool, Ui(place="Debug Tools")] = Field(
        False, title="Read wildcards in order", description="Take wildcard lines one after the other, not at random."
    )
    sharpness: Annotated[float, Ui(step=0.001, place="Advanced")] = Field(
        2.0, ge=0, le=30, title="Image Sharpness", description="Higher values give sharper texture; 0 turns it off."
    )
    guidance_scale: Annotated[float, Ui(step=0.01, place="Advanced")] = Field(
        4.0, ge=1, le=30, title="Guidance Scale", description="Higher values follow the prompt more closely."
    )


class ModelParams(ParamGroup, label="Models"):
    """Which weights draw the picture, and how they step."""

    base_model_name: Annotated[str, Ui(place="Models")] = Field(
        "juggernautXL_v8Rundiffusion.safetensors",
        title="Base Model (SDXL only)",
        min_length=1,
        description="Checkpoint file. The configured default falls back to the built-in demo model when it is absent.",
    )
    refiner_model_name: Annotated[ModelName, Ui(place="Models")] = Field(
        NO_MODEL, title="Refiner (SDXL or SD 1.5)", description="Second checkpoint for the last steps, or `None`."
    )
    refiner_switch: Annotated[float, Ui(step=0.0001, place="Models")] = Field(
        0.5,
        ge=0.1,
        le=1,
        title="Refiner Switch At",
        description="Share of the steps after which the refiner takes over.",
    )
    loras: Annotated[_wrapped_list(Lora), Ui(place="Models")] = Field(  # type: ignore[valid-type]
        (
            Lora(enabled=True, model_name="sd_xl_offset_example-lora_1.0.safetensors", weight=0.1),
            *(Lora(enabled=True, model_name=NO_MODEL, weight=1.0) for _ in range(4)),
        ),
        title="LoRAs",
        description="Rows of enabled, model_name and weight. Omitted: the configured rows.",
    )
    sampler_name: Annotated[SamplerName, Ui(place="Debug Tools")] = Field(
        SamplerName.DPMPP_2M_SDE_GPU, title="Sampler", description="How to step through the noise levels."
    )
    scheduler_name: Annotated[SchedulerName, Ui(place="Debug Tools")] = Field(
        SchedulerName.KARRAS, title="Scheduler", description="Which noise levels to visit."
    )
    vae_name: Annotated[str, Ui(place="Debug Tools")] = Field(
        DEFAULT_VAE, title="VAE", description="File that turns latents into pixels, or the checkpoint's own."
    )
    clip_skip: Annotated[int, Ui(step=1, place="Debug Tools")] = Field(
        2, ge=1, le=12, title="CLIP Skip", description="Which layer of the text encoders is used, from the end."
    )
    refiner_swap_method: Annotated[RefinerSwapMethod, Ui(place="Debug Tools")] = Field(
        RefinerSwapMethod.JOINT, title="Refiner swap method", description="How the run changes to the refiner."
    )


class InputImageParams(ParamGroup, label="Input Image"):
    """Pictures that a run starts from or is guided by."""

    input_image_checkbox: Annotated[bool, Ui()] = Field(
        False, title="Input Image", description="Ignored: the images themselves decide."
    )
    current_tab: Annotated[ImageTab, Ui()] = Field(
        ImageTab.UOV, title="Current tab", description="Set by the server from the images that were sent."
    )
    uov_method: Annotated[UovMethodField, Ui(place="Upscale or Variation", works=False)] = Field(
        UovMethod.DISABLED, title="Upscale or Variation:", description="What to do with the picture."
    )
    uov_input_image: Annotated[ImageText, Ui(place="Upscale or Variation", works=False)] = Field(
        "", title="Image", description="Picture to vary or enlarge: URL, data URI or base64."
    )
    upscale_multiple: Annotated[float, Ui(step=0.1, place="Upscale or Variation", works=False)] = Field(
        1.0, ge=1, le=5, title="Upscale factor", description="Used with Upscale (Custom)."
    )
    outpaint_selections: Annotated[tuple[OutpaintDirection, ...], Ui(place="Inpaint or Outpaint", works=False)] = Field(
        (), title="Outpaint Direction", description="Sides on which the picture grows."
    )
    outpaint_distance: Annotated[tuple[int, ...], Ui(place="Inpaint or Outpaint", works=False)] = Field(
        (0, 0, 0, 0),
        title="Outpaint distance",
        max_length=4,
        description="Pixels left, top, right, bottom; 0 means 30 % of that side.",
    )
    inpaint_input_image: Annotated[ImageText, Ui(place="Inpaint or Outpaint", works=False)] = Field(
        "", title="Image", description="Picture to repaint."
    )
    inpaint_additional_prompt: Annotated[
        str,
        BeforeValidator(lambda value: "" if value in (None, "None") else value),
        Ui(place="Inpaint or Outpaint", works=False),
    ] = Field("", title="Inpaint Additional Prompt", description="Put before the prompt on its own line.")
    inpaint_mask_image_upload: Annotated[ImageText, Ui(place="Inpaint or Outpaint", works=False)] = Field(
        "", title="Mask Upload", description="White is repainted."
    )
    inpaint_mask_upload_checkbox: Annotated[bool, Ui()] = Field(
        False, title="Enable Mask Upload", description="Ignored: a mask that is sent is used."
    )
    inpaint_advanced_masking_checkbox: Annotated[bool, Ui()] = Field(
        False, title="Enable Advanced Masking Features", description="Ignored: a mask that is sent is used."
    )
    invert_mask_checkbox: Annotated[bool, Ui()] = Field(
        False, title="Invert Mask When Generating", description="Always off for API calls."
    )
    controlnet_image: Annotated[_wrapped_list(ImagePrompt), Ui(place="Image Prompt", works=False)] = Field(  # type: ignore[valid-type]
        (ImagePrompt(),), title="Image Prompt", description="Up to four pictures that guide the run."
    )
    mixing_image_prompt_and_vary_upscale: Annotated[bool, Ui(place="Control", works=False)] = Field(
        False, title="Mixing Image Prompt and Vary/Upscale", description="Use both at once."
    )
    mixing_image_prompt_and_inpaint: Annotated[bool, Ui(place="Control", works=False)] = Field(
        False, title="Mixing Image Prompt and Inpaint", description="Use both at once."
    )


class DebugParams(ParamGroup, label="Debug Tools"):
    """Switches for people who know what they do."""

    disable_preview: Annotated[bool, Ui(place="Debug Tools")] = Field(
        False, title="Disable Preview", description="Show no picture while sampling."
    )
    disable_intermediate_results: Annotated[bool, Ui(place="Debug Tools")] = Field(
        False, title="Disable Intermediate Results", description="Show results only when all are done."
    )
    disable_seed_increment: Annotated[bool, Ui(place="Debug Tools")] = Field(
        False, title="Disable seed increment", description="Use the same seed for every picture."
    )
    black_out_nsfw: Annotated[bool, Ui(place="Debug Tools")] = Field(
        False, title="Black Out NSFW", description="Replace pictures that a classifier finds unsafe by black."
    )
    adm_scaler_positive: Annotated[float, Ui(step=0.001, place="Debug Tools")] = Field(
        1.5, ge=0, le=3, title="Positive ADM Guidance Scaler", description="Size told to the model with the prompt."
    )
    adm_scaler_negative: Annotated[float, Ui(step=0.001, place="Debug Tools")] = Field(
        0.8,
        ge=0,
        le=3,
        title="Negative ADM Guidance Scaler",
        description="Size told to the model with the negative prompt.",
    )
    adm_scaler_end: Annotated[float, Ui(step=0.001, place="Debug Tools")] = Field(
        0.3, ge=0, le=1, title="ADM Guidance End At Step", description="Share of the run after which scaling ends."
    )
    adaptive_cfg: Annotated[float, Ui(step=0.01, place="Debug Tools")] = Field(
        7.0,
        ge=1,
        le=30,
        title="CFG Mimicking from TSNR",
        description="Above this guidance scale the run mimics it at the start; below nothing changes.",
    )
    overwrite_step: Annotated[int, Ui(step=1, place="Debug Tools")] = Field(
        -1, ge=-1, le=200, title="Forced Overwrite of Sampling Step", description="Number of steps; 0 or less is off."
    )
    overwrite_switch: Annotated[float, Ui(step=1, place="Debug Tools")] = Field(
        -1,
        ge=-1,
        le=200,
        title="Forced Overwrite of Refiner Switch Step",
        description="Step of the switch; below 1 a share of the steps; 0 or less is off.",
    )
    overwrite_width: Annotated[int, Ui(step=1, place="Debug Tools")] = Field(
        -1, ge=-1, le=2048, title="Forced Overwrite of Generating Width", description="Pixels; 0 or less is off."
    )
    overwrite_height: Annotated[int, Ui(step=1, place="Debug Tools")] = Field(
        -1, ge=-1, le=2048, title="Forced Overwrite of Generating Height", description="Pixels; 0 or less is off."
    )
    overwrite_vary_strength: Annotated[float, Ui(step=0.001, place="Debug Tools", works=False)] = Field(
        -1, ge=-1, le=1, title='Forced Overwrite of Denoising Strength of "Vary"', description="0 or less is off."
    )
    overwrite_upscale_strength: Annotated[float, Ui(step=0.001, place="Debug Tools", works=False)] = Field(
        -1, ge=-1, le=1, title='Forced Overwrite of Denoising Strength of "Upscale"', description="0 or less is off."
    )


class ControlParams(ParamGroup, label="Control"):
    """Preprocessors of the control networks."""

    debugging_cn_preprocessor: Annotated[bool, Ui(place="Control", works=False)] = Field(
        False, title="Debug Preprocessors", description="Return the preprocessed pictures and stop."
    )
    skipping_cn_preprocessor: Annotated[bool, Ui(place="Control", works=False)] = Field(
        False, title="Skip Preprocessors", description="The pictures are preprocessed already."
    )
    canny_low_threshold: Annotated[int, Ui(step=1, place="Control", works=False)] = Field(
        64, ge=1, le=255, title="Canny Low Threshold", description="Weak edges below it are dropped."
    )
    canny_high_threshold: Annotated[int, Ui(step=1, place="Control", works=False)] = Field(
        128, ge=1, le=255, title="Canny High Threshold", description="Edges above it are kept."
    )
    controlnet_softness: Annotated[float, Ui(step=0.001, place="Control", works=False)] = Field(
        0.25, ge=0, le=1, title="Softness of ControlNet", description="How much the shallow layers are weakened."
    )


class FreeUParams(ParamGroup, label="FreeU"):
    """FreeU version 2: reweighted backbone and skip features."""

    freeu_enabled: Annotated[bool, Ui(place="FreeU")] = Field(False, title="Enabled", description="Use FreeU.")
    freeu_b1: Annotated[float, Ui(step=0.01, place="FreeU")] = Field(
        1.01, ge=0, le=2, title="B1", description="Backbone factor of the deepest blocks; 1 changes nothing."
    )
    freeu_b2: Annotated[float, Ui(step=0.01, place="FreeU")] = Field(
        1.02, ge=0, le=2, title="B2", description="Backbone factor of the next blocks; 1 changes nothing."
    )
    freeu_s1: Annotated[float, Ui(step=0.01, place="FreeU")] = Field(
        0.99, ge=0, le=4, title="S1", description="Skip factor of the deepest blocks; 1 changes nothing."
    )
    freeu_s2: Annotated[float, Ui(step=0.01, place="FreeU")] = Field(
        0.95, ge=0, le=4, title="S2", description="Skip factor of the next blocks; 1 changes nothing."
    )


class InpaintParams(ParamGroup, label="Inpaint"):
    """How a region is repainted."""

    debugging_inpaint_preprocessor: Annotated[bool, Ui(place="Inpaint", works=False)] = Field(
        False, title="Debug Inpaint Preprocessing", description="Return fill, mask and crop, and stop."
    )
    inpaint_disable_initial_latent: Annotated[bool, Ui(place="Inpaint", works=False)] = Field(
        False, title="Disable initial latent in inpaint", description="Start the region from pure noise."
    )
    inpaint_engine: Annotated[InpaintEngine, Ui(place="Inpaint", works=False)] = Field(
        InpaintEngine.V26, title="Inpaint Engine", description="Version of the inpaint patch."
    )
    inpaint_strength: Annotated[float, Ui(step=0.001, place="Inpaint", works=False)] = Field(
        1.0, ge=0, le=1, title="Inpaint Denoising Strength", description="Share of the schedule run on the region."
    )
    inpaint_respective_field: Annotated[float, Ui(step=0.001, place="Inpaint", works=False)] = Field(
        0.618, ge=0, le=1, title="Inpaint Respective Field", description="0: the masked area, 1: the whole picture."
    )
    inpaint_erode_or_dilate: Annotated[int, Ui(step=1, place="Inpaint", works=False)] = Field(
        0, ge=-64, le=64, title="Mask Erode or Dilate", description="Pixels by which the mask shrinks or grows."
    )


class SavingParams(ParamGroup, label="Saving"):
    """What is written beside the pixels."""

    save_metadata_to_images: Annotated[bool, Ui(place="Debug Tools")] = Field(
        True, title="Save Metadata to Images", description="Write the parameters into the file."
    )
    metadata_scheme: Annotated[MetadataScheme, BeforeValidator(_metadata_scheme), Ui(place="Debug Tools")] = Field(
        MetadataScheme.FOOOCUS, title="Metadata Scheme", description="fooocus is JSON, a1111 is plain text."
    )
    generate_image_grid: Annotated[bool, Ui(place="Debug Tools")] = Field(
        False, title="Generate Image Grid for Each Batch", description="Add one contact sheet to the results."
    )


class EnhanceParams(ParamGroup, label="Enhance"):
    """Passes that improve parts of finished pictures."""

    enhance_checkbox: Annotated[bool, Ui(place="enhance", works=False)] = Field(
        False, title="Enhance", description="Run the enhancement passes."
    )
    enhance_input_image: Annotated[ImageText, Ui(place="enhance", works=False)] = Field(
        "", title="Use with Enhance, skips image generation", description="Enhance this picture instead of a new one."
    )
    enhance_uov_method: Annotated[UovMethodField, Ui(place="enhance", works=False)] = Field(
        UovMethod.DISABLED, title="Upscale or Variation:", description="Applied before or after the passes."
    )
    enhance_uov_processing_order: Annotated[EnhanceOrder, Ui(place="enhance", works=False)] = Field(
        EnhanceOrder.BEFORE, title="Order of Processing", description="When upscale or variation runs."
    )
    enhance_uov_prompt_type: Annotated[EnhancePrompt, Ui(place="enhance", works=False)] = Field(
        EnhancePrompt.ORIGINAL, title="Prompt", description="Prompts used when it runs last."
    )
    enhance_ctrls: Annotated[_wrapped_list(EnhanceCtrl), Ui(place="enhance", works=False)] = Field(  # type: ignore[valid-type]
        (), title="Passes", description="Up to three passes."
    )
    save_final_enhanced_image_only: Annotated[bool, Ui(place="Debug Tools", works=False)] = Field(
        False, title="Save only final enhanced image", description="Keep only the last picture of each chain."
    )
    debugging_dino: Annotated[bool, Ui(place="Inpaint", works=False)] = Field(
        False, title="Debug GroundingDINO", description="Use boxes instead of masks."
    )
    dino_erode_or_dilate: Annotated[float, Ui(step=1, place="Inpaint", works=False)] = Field(
        0, ge=-64, le=64, title="GroundingDINO Box Erode or Dilate", description="Pixels by which boxes shrink or grow."
    )
    debugging_enhance_masks_checkbox: Annotated[bool, Ui(place="Inpaint", works=False)] = Field(
        False, title="Debug Enhance Masks", description="Add the masks to the results."
    )


class DeliveryParams(ParamGroup, label="Delivery"):
    """How an API call is answered; never on the page."""

    preset: str = Field("initial", title="Preset", description="Preset under the values of this request.")
    download_missing: bool = Field(
        False,
        title="Download missing files",
        description="Fetch model files that are not here but have a source in a preset or in config.txt.",
    )
    stream_output: bool = Field(False, title="Stream", description="Answer with server-sent events.")
    async_process: bool = Field(False, title="Asynchronous", description="Answer at once with the task id.")
    require_base64: bool = Field(
        False, title="Base64 results", description="Add `result_base64`, a list of data URIs, to the record."
    )
    webhook_url: Annotated[str, BeforeValidator(_none_to_empty)] = Field(
        "", title="Webhook", max_length=4096, description="URL that gets the record when the task ends."
    )
    save_name: Annotated[str, BeforeValidator(_none_to_empty)] = Field(
        "", title="File name", max_length=1000, description="Files become `{save_name}-{i}.{suffix}`."
    )
    priority: Literal["interactive", "batch"] = Field(
        "interactive",
        title="Priority",
        description="Interactive tasks go before batch tasks, else first in, first out.",
    )
    on_disconnect: Literal["", "continue", "stop"] = Field(
        "", title="On disconnect", description="What happens when the caller goes away; empty: the server's setting."
    )


PAGE_GROUPS: tuple[type[ParamGroup], ...] = (
    PromptParams,
    SettingsParams,
    ModelParams,
    InputImageParams,
    DebugParams,
    ControlParams,
    FreeUParams,
    InpaintParams,
    SavingParams,
    EnhanceParams,
)


def ui_of(group: type[BaseModel], name: str) -> Ui:
    """How the field `name` of `group` is shown; fields without a mark stay off the page."""
    return next((mark for mark in group.model_fields[name].metadata if isinstance(mark, Ui)), Ui())
