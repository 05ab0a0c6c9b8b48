"""Turns a request into what will be run, in the terms of the field; knows no tensors.

What a performance mode fixes, which overwrite wins, which file stands in for a missing default: all decided here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modules.choices import (
    DEFAULT_VAE,
    FIXED_BY_PERFORMANCE,
    MAX_SEED,
    NO_MODEL,
    MetadataScheme,
    OutputFormat,
    Performance,
    RefinerSwapMethod,
    SamplerName,
    SchedulerName,
)
from modules.errors import InvalidRequest, UnknownName
from modules.files import Catalogue, Kind
from modules.params import parse_size
from modules.presets import OLD_DEFAULT_MODELS
from modules.prompts import ImagePrompt, LoraChoice, PromptSources, PromptTask, prepare_image_prompt
from modules.request import GenerationRequest

EMBEDDED_MODEL = "focale-tiny.safetensors"
EMBEDDED_FEW_STEP_LORA = "focale-few-step.safetensors"  # stands in for every mode's LoRA with that model
SDXL_NATIVE_SIZE = 1024
SIZE_MULTIPLE_PX = 16  # of demo models, whose pictures are small


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of weights, by the name users know and by its place."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA to merge.

    weight: multiple of the file's own strength, any sign.
    """

    name: str
    path: Path
    weight: float


@dataclass(frozen=True, slots=True)
class AdmScalers:
    """Factors on the picture size told to the model.

    positive, negative: for the prompt and the negative prompt; 1 tells the true size.
    end: share of the run after which both are 1.
    """

    positive: float
    negative: float
    end: float


@dataclass(frozen=True, slots=True)
class FreeU:
    """Factors of FreeU version 2; 1 changes nothing."""

    b1: float
    b2: float
    s1: float
    s2: float


@dataclass(frozen=True, slots=True)
class ModelsPlan:
    """Which weights draw the pictures.

    checkpoint: the base model; refiner: None for none; vae: None for the checkpoint's own.
    clip_skip: 1 for the last layer of the text encoders, 2 for the one before, and so on.
    notices: sentences for the person who asked.
    """

    checkpoint: ModelFile
    refiner: ModelFile | None
    vae: ModelFile | None
    clip_skip: int
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How noise becomes latents.

    width, height: pixels of the picture.
    strength: share of the schedule that is run; 1 starts from pure noise.
    adaptive_guidance_scale: guidance scale mimicked early in the run when `guidance_scale` is larger.
    refiner_switch_step: step after which the refiner takes over; equal to `steps` or more for never.
    coarse_factor: by which the latents are reduced while shapes form; 1 for never.
    """

    width: int
    height: int
    steps: int
    sampler: SamplerName
    scheduler: SchedulerName
    strength: float
    guidance_scale: float
    adaptive_guidance_scale: float
    sharpness: float
    adm: AdmScalers
    freeu: FreeU | None
    refiner_switch_step: int
    refiner_swap_method: RefinerSwapMethod
    coarse_factor: int = 1


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """One picture: its number from 0, its seed, its texts, and the LoRAs merged for it in order."""

    index: int
    seed: int
    texts: ImagePrompt
    loras: tuple[LoraFile, ...]


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """What is written.

    save_name: "" for dated names.
    metadata: the scheme, or None for no metadata.
    """

    format: OutputFormat
    save_name: str
    metadata: MetadataScheme | None
    grid: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one task will do."""

    models: ModelsPlan
    sampling: SamplingPlan
    images: tuple[ImagePlan, ...]
    output: OutputPlan
    performance: Performance
    previews: bool
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlanResources:
    """What this machine offers to a planner.

    default_model: the configured default checkpoint; previous_default_models: names that may stand in for it.
    predecessors: other models → names that may stand in for them, best first.
    default_loras: file names of the configured rows, which are left out when absent.
    default_styles: the configured styles, which are left out for the demo model.
    default_size: the configured size, "W*H", in whose place the demo model draws a square.
    """

    catalogue: Catalogue
    prompts: PromptSources
    default_model: str
    previous_default_models: tuple[str, ...] = ()
    predecessors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default_loras: frozenset[str] = frozenset()
    default_styles: tuple[str, ...] = ()
    default_size: str = ""
    max_loras: int = 5
    allow_metadata: bool = True
    known_default_models: frozenset[str] = field(default=OLD_DEFAULT_MODELS)


def effective(request: GenerationRequest) -> GenerationRequest:
    """The request with the values its performance mode imposes."""
    forced = FIXED_BY_PERFORMANCE[request.performance_selection].forced
    return request.changed(**forced) if forced else request


def plan_models(request: GenerationRequest, resources: PlanResources) -> ModelsPlan:
    """Find the weights a request needs.

    Raises:
        UnknownName: a model that was named is in no folder.
    """
    request = effective(request)
    checkpoint, notices = _checkpoint(request.base_model_name, resources)
    refiner = None
    if request.refiner_model_name not in (NO_MODEL, request.base_model_name):
        refiner = _named("refiner_model_name", Kind.CHECKPOINT, request.refiner_model_name, resources)
    vae = None if request.vae_name == DEFAULT_VAE else _named("vae_name", Kind.VAE, request.vae_name, resources)
    return ModelsPlan(checkpoint, refiner, vae, request.clip_skip, notices)


def make_plan(
    request: GenerationRequest,
    resources: PlanResources,
    *,
    models: ModelsPlan | None = None,
    native_size_px: int = SDXL_NATIVE_SIZE,
) -> Plan:
    """Decide everything about a task whose seed is resolved.

    Args:
        models: the weights, if they were found before.
        native_size_px: side of the square pictures the checkpoint was trained on; listed sizes are scaled to it.
    Raises:
        UnknownName: a name in the request is in no list.
        InvalidRequest: a LoRA that a performance mode needs is missing.
    """
    asked = request
    request = effective(request)
    models = models or plan_models(asked, resources)
    is_demo = models.checkpoint.name == EMBEDDED_MODEL
    notices = list(models.notices)
    if is_demo:
        request = _squared_where_default(request, resources, native_size_px, notices)
    loras = _chosen_loras(request, resources, notices)
    mode_loras = _performance_loras(asked, resources, notices, is_demo=is_demo)
    task = PromptTask(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        styles=_styles(request, resources, notices, is_demo=is_demo),
        loras=loras,
        max_loras=resources.max_loras,
        wildcards_in_order=request.read_wildcards_in_order,
    )
    sources = _prompt_sources(resources, mode_loras)
    images = tuple(
        _image_plan(index, request, task, sources, resources, mode_loras, notices)
        for index in range(request.image_number)
    )
    return Plan(
        models=models,
        sampling=plan_sampling(request, native_size_px=native_size_px, has_refiner=models.refiner is not None),
        images=images,
        output=_output_plan(request, resources),
        performance=request.performance_selection,
        previews=not request.disable_preview and not request.black_out_nsfw,
        notices=tuple(dict.fromkeys(notices)),
    )


def plan_sampling(
    request: GenerationRequest, *, native_size_px: int = SDXL_NATIVE_SIZE, has_refiner: bool = False
) -> SamplingPlan:
    """The numbers of the sampling loop, after overwrites."""
    facts = FIXED_BY_PERFORMANCE[request.performance_selection]
    steps = request.overwrite_step if request.overwrite_step > 0 else facts.steps
    width, height = picture_size(request, native_size_px)
    freeu = FreeU(request.freeu_b1, request.freeu_b2, request.freeu_s1, request.freeu_s2)
    return SamplingPlan(
        width=width,
        height=height,
        steps=steps,
        sampler=request.sampler_name,
        scheduler=request.scheduler_name,
        strength=1.0,
        guidance_scale=request.guidance_scale,
        adaptive_guidance_scale=request.adaptive_cfg,
        sharpness=request.sharpness,
        adm=AdmScalers(request.adm_scaler_positive, request.adm_scaler_negative, request.adm_scaler_end),
        freeu=freeu if request.freeu_enabled else None,
        refiner_switch_step=switch_step(request, steps) if has_refiner else steps,
        refiner_swap_method=request.refiner_swap_method,
        coarse_factor=coarse_factor(width, height, native_size_px),
    )


def coarse_factor(width: int, height: int, native_size_px: int) -> int:
    """How many times a picture is larger than what its model was trained on, to the nearest whole number.

    Always 1 for SDXL's own size: large pictures of real checkpoints are drawn as Fooocus draws them.
    """
    return 1 if native_size_px == SDXL_NATIVE_SIZE else max(1, round((width * height) ** 0.5 / native_size_px))


def switch_step(request: GenerationRequest, steps: int) -> int:
    """Step at which the refiner takes over.

    `overwrite_switch`: a step from 1 on, a share of the steps below 1, off at 0 or less; else `refiner_switch` as a
    share. Rounded half to even, as Python rounds.
    """
    overwrite = request.overwrite_switch
    if overwrite >= 1:
        return round(overwrite)
    return round(steps * (overwrite if overwrite > 0 else request.refiner_switch))


def picture_size(request: GenerationRequest, native_size_px: int = SDXL_NATIVE_SIZE) -> tuple[int, int]:
    """Width and height in pixels.

    An overwrite counts as it is; a listed size is scaled to the size the checkpoint was trained on.
    """
    width, height = parse_size(request.aspect_ratios_selection)
    if native_size_px != SDXL_NATIVE_SIZE and width * height > (2 * native_size_px) ** 2:
        scale = native_size_px / (width * height) ** 0.5
        width, height = (_to_multiple(side * scale) for side in (width, height))
    return (
        request.overwrite_width if request.overwrite_width > 0 else width,
        request.overwrite_height if request.overwrite_height > 0 else height,
    )


def image_seed(request: GenerationRequest, index: int) -> int:
    """Seed of picture `index`: counted up from the request's, or the same for all."""
    return (request.image_seed + (0 if request.disable_seed_increment else index)) % (MAX_SEED + 1)


def _to_multiple(side: float) -> int:
    return max(SIZE_MULTIPLE_PX * 4, round(side / SIZE_MULTIPLE_PX) * SIZE_MULTIPLE_PX)


def _checkpoint(name: str, resources: PlanResources) -> tuple[ModelFile, tuple[str, ...]]:
    """The base model; a missing default is stood in for, a missing model that someone named is an error."""
    found = resources.catalogue.find(Kind.CHECKPOINT, name)
    if found:
        return ModelFile(name, found), ()
    predecessors = resources.predecessors.get(name, ())
    stand_ins = (resources.default_model, *resources.previous_default_models, EMBEDDED_MODEL)
    is_default = name == resources.default_model or name in resources.known_default_models
    for stand_in in (*predecessors, *(stand_ins if is_default else ())):
        found = resources.catalogue.find(Kind.CHECKPOINT, stand_in)
        if found:
            return ModelFile(stand_in, found), (_stand_in_notice(name, stand_in),)
    raise UnknownName("base_model_name", name, resources.catalogue.names(Kind.CHECKPOINT), what="checkpoint")


def _stand_in_notice(name: str, stand_in: str) -> str:
    if stand_in == EMBEDDED_MODEL:
        return (
            f"{name} is not in models/checkpoints, so the built-in demo model draws small pictures. "
            "Put an SDXL checkpoint there for real ones."
        )
    return f"{name} is not in models/checkpoints; {stand_in} stood in for it."


def _named(field_name: str, kind: Kind, name: str, resources: PlanResources) -> ModelFile:
    found = resources.catalogue.find(kind, name)
    if not found:
        raise UnknownName(field_name, name, resources.catalogue.names(kind), what=f"{kind.value} file")
    return ModelFile(name, found)


def _styles(
    request: GenerationRequest, resources: PlanResources, notices: list[str], *, is_demo: bool
) -> tuple[str, ...]:
    """The request's styles; the demo model, which knows few words, goes without those nobody chose."""
    if is_demo and request.style_selections and request.style_selections == resources.default_styles:
        notices.append(
            "The default styles were left out: their words are new to the demo model and spoil its pictures."
        )
        return ()
    return request.style_selections


def _squared_where_default(
    request: GenerationRequest, resources: PlanResources, native_size_px: int, notices: list[str]
) -> GenerationRequest:
    """The request; with a square, which the demo model draws better, where nobody chose a size."""
    width, height = picture_size(request, native_size_px)
    was_overwritten = request.overwrite_width > 0 or request.overwrite_height > 0
    if request.aspect_ratios_selection != resources.default_size or was_overwritten or width == height:
        return request
    notices.append(
        f"The default size was left out: the demo model draws squares better than {width}×{height}. "
        "Every other size is kept."
    )
    return request.changed(aspect_ratios_selection=f"{native_size_px}*{native_size_px}")


def _chosen_loras(request: GenerationRequest, resources: PlanResources, notices: list[str]) -> tuple[LoraChoice, ...]:
    """The request's LoRA rows; configured rows whose file is absent are left out with a notice."""
    rows: list[LoraChoice] = []
    for position, row in enumerate(request.loras[: resources.max_loras]):
        if not row.enabled:
            continue
        if row.is_active and not resources.catalogue.find(Kind.LORA, row.model_name):
            if row.model_name not in resources.default_loras:
                raise UnknownName(
                    ("loras", position, "model_name"), row.model_name, resources.catalogue.names(Kind.LORA), what="LoRA"
                )
            notices.append(f"The default LoRA {row.model_name} is not in models/loras and was left out.")
            continue
        rows.append(LoraChoice(row.model_name, row.weight))
    return tuple(rows)


def _performance_loras(
    request: GenerationRequest, resources: PlanResources, notices: list[str], *, is_demo: bool
) -> tuple[LoraChoice, ...]:
    """The distilled LoRA of the performance mode; for the demo model its own, which serves all modes at full weight."""
    facts = FIXED_BY_PERFORMANCE[request.performance_selection]
    if facts.lora is None:
        return ()
    if is_demo and resources.catalogue.find(Kind.LORA, EMBEDDED_FEW_STEP_LORA):
        return (LoraChoice(EMBEDDED_FEW_STEP_LORA, 1.0),)
    if is_demo:
        notices.append(
            f"{request.performance_selection.value} needs a LoRA made for the model, and {EMBEDDED_FEW_STEP_LORA} is "
            "not in models/embedded/loras, so the demo model's pictures stay rough in this mode."
        )
        return ()
    if not resources.catalogue.find(Kind.LORA, facts.lora):
        raise InvalidRequest(
            "performance_selection",
            f"{request.performance_selection.value} needs {facts.lora} in models/loras; "
            "put it there, or choose Speed or Quality.",
            request.performance_selection.value,
        )
    return (LoraChoice(facts.lora, facts.lora_weight),)


def _prompt_sources(resources: PlanResources, mode_loras: Iterable[LoraChoice]) -> PromptSources:
    """What prompts may use; the LoRA of the performance mode is hidden, so that no tag merges it twice."""
    hidden = {choice.file for choice in mode_loras}
    visible = {stem: file for stem, file in resources.prompts.lora_files.items() if file not in hidden}
    return replace(resources.prompts, lora_files=visible)


def _image_plan(
    index: int,
    request: GenerationRequest,
    task: PromptTask,
    sources: PromptSources,
    resources: PlanResources,
    mode_loras: Sequence[LoraChoice],
    notices: list[str],
) -> ImagePlan:
    seed = image_seed(request, index)
    texts = prepare_image_prompt(task, sources, index=index, seed=seed)
    notices.extend(f"There is no LoRA called {name!r}; its tag had no effect." for name in texts.unknown_loras)
    loras = tuple(
        LoraFile(choice.file, path, choice.weight)
        for choice in (*texts.loras, *mode_loras)
        if choice.file != NO_MODEL and (path := resources.catalogue.find(Kind.LORA, choice.file))
    )
    return ImagePlan(index, seed, texts, loras)


def _output_plan(request: GenerationRequest, resources: PlanResources) -> OutputPlan:
    with_metadata = request.save_metadata_to_images and resources.allow_metadata
    return OutputPlan(
        format=request.output_format,
        save_name=request.save_name,
        metadata=request.metadata_scheme if with_metadata else None,
        grid=request.generate_image_grid,
    )
