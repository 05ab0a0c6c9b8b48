"""The keys of config.txt and of presets: types, defaults, and the reading that replaces wrong values."""

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from modules.choices import (
    ASPECT_RATIOS,
    DEFAULT_VAE,
    NO_MODEL,
    STOP_AND_WEIGHT_BY_TYPE,
    ClothCategory,
    ControlType,
    EnhanceOrder,
    EnhancePrompt,
    InpaintEngine,
    MaskModel,
    MetadataScheme,
    OutputFormat,
    Performance,
    SamModel,
    SamplerName,
    SchedulerName,
    UovMethod,
)

INPAINT_METHODS = (
    "Inpaint or Outpaint (default)",
    "Improve Detail (face, hand, eyes, etc.)",
    "Modify Content (add objects, change background, etc.)",
)


class LoraDefault(NamedTuple):
    """One row of `default_loras`."""

    enabled: bool
    model_name: str
    weight: float


def _lora_row(value: object) -> object:
    """A row [name, weight] of old files means an enabled one."""
    return [True, *value] if isinstance(value, (list, tuple)) and len(value) == 2 else value


def _text(value: object) -> object:
    """None counts as empty."""
    return "" if value is None else value


def _model_name(value: object) -> object:
    """None and "" count as "None"."""
    return value or NO_MODEL


def _size(value: object) -> object:
    """Width and height joined by "*", whatever sign and markup they came with."""
    found = re.match(r"\s*(\d+)\s*[*x×]\s*(\d+)", value, re.IGNORECASE) if isinstance(value, str) else None
    return f"{found[1]}*{found[2]}" if found else value


def _list(value: object) -> object:
    """A single value counts as a list of one."""
    return value if isinstance(value, (list, tuple)) else [value]


def _inpaint_engine(value: object) -> object:
    """None counts as "None"."""
    return InpaintEngine.NONE if value in (None, "") else value


Text = Annotated[str, BeforeValidator(_text)]
ModelName = Annotated[str, BeforeValidator(_model_name)]
Size = Annotated[str, BeforeValidator(_size), Field(pattern=r"^\d+\*\d+$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
LoraWeight = Annotated[float, Field(ge=-10.0, le=10.0)]
LoraRow = Annotated[LoraDefault, BeforeValidator(_lora_row)]
MaskEngine = Annotated[InpaintEngine, BeforeValidator(_inpaint_engine)]


class ImagePromptDefault(BaseModel):
    """Start values of one image prompt; image is a path or None."""

    model_config = ConfigDict(frozen=True)

    image: str | None = None
    type: ControlType = ControlType.IMAGE_PROMPT
    stop_at: float | None = Field(default=None, ge=0.0, le=1.0)
    weight: float | None = Field(default=None, ge=0.0, le=2.0)


class Config(BaseModel):
    """Every key of config.txt but the paths, under the names Fooocus gave them."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), defer_build=True)

    temp_path_cleanup_on_launch: bool = True
    default_model: ModelName = "model.safetensors"
    previous_default_models: tuple[str, ...] = ()
    default_refiner: ModelName = NO_MODEL
    default_refiner_switch: Fraction = 0.8
    default_loras_min_weight: LoraWeight = -2.0
    default_loras_max_weight: LoraWeight = 2.0
    default_loras: tuple[LoraRow, ...] = (LoraDefault(True, NO_MODEL, 1.0),) * 5
    default_max_lora_number: int = Field(
        default_factory=lambda known: len(known.get("default_loras", ())) or 5, ge=1, le=64
    )
    default_cfg_scale: float = Field(7.0, ge=1.0, le=30.0)
    default_sample_sharpness: float = Field(2.0, ge=0.0, le=30.0)
    default_cfg_tsnr: float = Field(7.0, ge=1.0, le=30.0)
    default_sampler: SamplerName = SamplerName.DPMPP_2M_SDE_GPU
    default_scheduler: SchedulerName = SchedulerName.KARRAS
    default_vae: Annotated[str, BeforeValidator(lambda value: value or DEFAULT_VAE)] = DEFAULT_VAE
    default_clip_skip: int = Field(2, ge=1, le=12)
    default_styles: tuple[str, ...] = ("Fooocus V2", "Fooocus Enhance", "Fooocus Sharp")
    default_prompt: Text = ""
    default_prompt_negative: Text = ""
    default_performance: Performance = Performance.SPEED
    default_aspect_ratio: Size = "1152*896"
    available_aspect_ratios: tuple[Size, ...] = Field(ASPECT_RATIOS, min_length=1)
    default_image_number: int = Field(2, ge=1)
    default_max_image_number: int = Field(32, ge=1)
    default_output_format: OutputFormat = OutputFormat.PNG
    checkpoint_downloads: dict[str, str] = {}
    lora_downloads: dict[str, str] = {}
    embeddings_downloads: dict[str, str] = {}
    vae_downloads: dict[str, str] = {}
    default_image_prompt_checkbox: bool = False
    default_enhance_checkbox: bool = False
    default_advanced_checkbox: bool = False
    default_developer_debug_mode_checkbox: bool = False
    default_image_prompt_advanced_checkbox: bool = False
    default_selected_image_input_tab_id: Literal[
        "uov_tab", "ip_tab", "inpaint_tab", "describe_tab", "enhance_tab", "metadata_tab"
    ] = "uov_tab"
    default_uov_method: UovMethod = UovMethod.DISABLED
    default_controlnet_image_count: int = Field(4, ge=1, le=16)
    default_inpaint_engine_version: MaskEngine = InpaintEngine.V26
    default_inpaint_method: Literal[
        "Inpaint or Outpaint (default)",
        "Improve Detail (face, hand, eyes, etc.)",
        "Modify Content (add objects, change background, etc.)",
    ] = "Inpaint or Outpaint (default)"
    default_inpaint_advanced_masking_checkbox: bool = False
    default_invert_mask_checkbox: bool = False
    default_inpaint_mask_model: MaskModel = MaskModel.ISNET_GENERAL_USE
    default_enhance_inpaint_mask_model: MaskModel = MaskModel.SAM
    default_inpaint_mask_cloth_category: ClothCategory = ClothCategory.FULL
    default_inpaint_mask_sam_model: SamModel = SamModel.VIT_B
    default_sam_max_detections: int = Field(0, ge=0, le=10)
    default_overwrite_step: int = Field(-1, ge=-1, le=200)
    default_overwrite_switch: float = Field(-1, ge=-1, le=200)
    default_overwrite_upscale: float = Field(-1, ge=-1, le=1)
    default_enhance_tabs: int = Field(3, ge=1, le=5)
    default_enhance_uov_method: UovMethod = UovMethod.DISABLED
    default_enhance_uov_processing_order: EnhanceOrder = EnhanceOrder.BEFORE
    default_enhance_uov_prompt_type: EnhancePrompt = EnhancePrompt.ORIGINAL
    example_inpaint_prompts: tuple[str, ...] = (
        "highly detailed face", "detailed girl face", "detailed man face", "detailed hand", "beautiful eyes",
    )  # fmt: skip
    example_enhance_detection_prompts: tuple[str, ...] = ("face", "eye", "mouth", "hair", "hand", "body")
    default_black_out_nsfw: bool = False
    default_save_only_final_enhanced_image: bool = False
    default_save_metadata_to_images: bool = False
    default_metadata_scheme: MetadataScheme = MetadataScheme.FOOOCUS
    metadata_created_by: Text = ""
    default_describe_apply_prompts_checkbox: bool = True
    default_describe_content_type: Annotated[tuple[str, ...], BeforeValidator(_list)] = ("Photograph",)
    default_image_prompts: tuple[ImagePromptDefault, ...] = Field((), exclude=True)

    def image_prompt_defaults(self) -> tuple[ImagePromptDefault, ...]:
        """One entry for each image prompt on the page, with stop and weight filled in by its type."""
        given = self.default_image_prompts[: self.default_controlnet_image_count]
        rows = given + (ImagePromptDefault(),) * (self.default_controlnet_image_count - len(given))
        return tuple(_with_stop_and_weight(row) for row in rows)


def _with_stop_and_weight(row: ImagePromptDefault) -> ImagePromptDefault:
    """The same row with the usual stop and weight of its type where it names none."""
    stop_at, weight = STOP_AND_WEIGHT_BY_TYPE[row.type]
    return ImagePromptDefault(
        image=row.image,
        type=row.type,
        stop_at=stop_at if row.stop_at is None else row.stop_at,
        weight=weight if row.weight is None else row.weight,
    )


Layer = tuple[str, Mapping[str, object]]  # name of the source, its values


def literal(text: str) -> object:
    """An environment variable read as a Python literal; what is none stays text."""
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value


def environment_values(env: Mapping[str, str], keys: Iterable[str]) -> dict[str, object]:
    """The keys that the environment sets, as literals."""
    return {key: literal(env[key]) for key in keys if key in env}


def config_keys() -> tuple[str, ...]:
    """Every key that config.txt may hold besides the paths."""
    return (*(key for key in Config.model_fields if key != "default_image_prompts"), *_image_prompt_keys(16))


def read_config(layers: Iterable[Layer]) -> tuple[Config, list[str]]:
    """The configuration out of its layers, strongest first, and a sentence about each value that was wrong.

    In place of a wrong value the next weaker layer's is used, in the end the default.
    """
    remaining = [(source, dict(values)) for source, values in layers]
    problems: list[str] = []
    while True:
        found = {key: source for source, values in reversed(remaining) for key in values}
        values = {key: value for _, layer in reversed(remaining) for key, value in layer.items()}
        try:
            return Config.model_validate({**values, "default_image_prompts": _image_prompt_rows(values)}), problems
        except ValidationError as error:
            for key, message in _wrong_keys(error).items():
                problems.append(f"{key} = {values[key]!r} in {found[key]} is ignored: {message}.")
                next(layer for source, layer in remaining if source == found[key]).pop(key)


def _image_prompt_keys(count: int) -> list[str]:
    """Names of the numbered keys, 1 to count."""
    return [f"default_ip_{part}_{n}" for n in range(1, count + 1) for part in ImagePromptDefault.model_fields]


def _image_prompt_rows(values: Mapping[str, object]) -> list[dict[str, object]]:
    """The numbered keys `default_ip_type_2` and so on as rows, up to the last one that is named."""
    named = [key for key in _image_prompt_keys(16) if key in values]
    last = max((int(key.rpartition("_")[2]) for key in named), default=0)
    return [
        {
            part: values[key]
            for part in ImagePromptDefault.model_fields
            if values.get(key := f"default_ip_{part}_{n}") not in (None, "", "None")
        }
        for n in range(1, last + 1)
    ]


def _wrong_keys(error: ValidationError) -> dict[str, str]:
    """Key of the file → first message, for every key the model refused."""
    wrong: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        if detail["type"] == "default_factory_not_called":
            continue  # follows from another key's fault
        key = str(detail["loc"][0])
        if key == "default_image_prompts":
            key = f"default_ip_{detail['loc'][2]}_{int(detail['loc'][1]) + 1}"
        wrong.setdefault(key, detail["msg"])
    return wrong
