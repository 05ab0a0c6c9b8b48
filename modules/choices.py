"""The closed lists of the vocabulary: every value a choice can take, and what a performance mode fixes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class Performance(StrEnum):
    """How many steps are spent on a picture, and with which distilled LoRA."""

    QUALITY = "Quality"
    SPEED = "Speed"
    EXTREME_SPEED = "Extreme Speed"
    LIGHTNING = "Lightning"
    HYPER_SD = "Hyper-SD"


class ContentType(StrEnum):
    """What a picture that is to be described is, in the page's words; `kind` is the description's name on the wire."""

    PHOTOGRAPH = "Photograph"
    ART = "Art/Anime"

    @property
    def kind(self) -> str:
        """Photo asks for a sentence, Anime for tags."""
        return {ContentType.PHOTOGRAPH: "Photo", ContentType.ART: "Anime"}[self]


class SamplerName(StrEnum):
    """Names of the samplers, as Fooocus and ComfyUI spell them."""

    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    HEUN = "heun"
    HEUNPP2 = "heunpp2"
    DPM_2 = "dpm_2"
    DPM_2_ANCESTRAL = "dpm_2_ancestral"
    LMS = "lms"
    DPM_FAST = "dpm_fast"
    DPM_ADAPTIVE = "dpm_adaptive"
    DPMPP_2S_ANCESTRAL = "dpmpp_2s_ancestral"
    DPMPP_SDE = "dpmpp_sde"
    DPMPP_SDE_GPU = "dpmpp_sde_gpu"
    DPMPP_2M = "dpmpp_2m"
    DPMPP_2M_SDE = "dpmpp_2m_sde"
    DPMPP_2M_SDE_GPU = "dpmpp_2m_sde_gpu"
    DPMPP_3M_SDE = "dpmpp_3m_sde"
    DPMPP_3M_SDE_GPU = "dpmpp_3m_sde_gpu"
    DDPM = "ddpm"
    LCM = "lcm"
    TCD = "tcd"
    RESTART = "restart"
    DDIM = "ddim"
    UNI_PC = "uni_pc"
    UNI_PC_BH2 = "uni_pc_bh2"


class SchedulerName(StrEnum):
    """Names of the noise schedules."""

    NORMAL = "normal"
    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    SGM_UNIFORM = "sgm_uniform"
    SIMPLE = "simple"
    DDIM_UNIFORM = "ddim_uniform"
    LCM = "lcm"
    TURBO = "turbo"
    ALIGN_YOUR_STEPS = "align_your_steps"
    TCD = "tcd"
    EDM_PLAYGROUND = "edm_playground_v2.5"


class RefinerSwapMethod(StrEnum):
    """How the run changes from the base model to the refiner."""

    JOINT = "joint"
    SEPARATE = "separate"
    VAE = "vae"


class OutputFormat(StrEnum):
    """File formats of results; jpg and jpeg differ in the suffix only."""

    PNG = "png"
    JPG = "jpg"
    JPEG = "jpeg"
    WEBP = "webp"


class MetadataScheme(StrEnum):
    """How generation parameters are written into a file."""

    FOOOCUS = "fooocus"
    A1111 = "a1111"


class UovMethod(StrEnum):
    """What "Upscale or Variation" does with its picture."""

    DISABLED = "Disabled"
    VARY_SUBTLE = "Vary (Subtle)"
    VARY_STRONG = "Vary (Strong)"
    UPSCALE_15 = "Upscale (1.5x)"
    UPSCALE_2 = "Upscale (2x)"
    UPSCALE_FAST = "Upscale (Fast 2x)"
    UPSCALE_CUSTOM = "Upscale (Custom)"


class ControlType(StrEnum):
    """What an image prompt controls."""

    IMAGE_PROMPT = "ImagePrompt"
    FACE_SWAP = "FaceSwap"
    PYRA_CANNY = "PyraCanny"
    CPDS = "CPDS"


class OutpaintDirection(StrEnum):
    """Sides on which a picture can be extended."""

    LEFT = "Left"
    RIGHT = "Right"
    TOP = "Top"
    BOTTOM = "Bottom"


class InpaintEngine(StrEnum):
    """Versions of the inpaint patch."""

    NONE = "None"
    V1 = "v1"
    V25 = "v2.5"
    V26 = "v2.6"


class ImageTab(StrEnum):
    """Which image input is in use."""

    UOV = "uov"
    INPAINT = "inpaint"
    OUTPAINT = "outpaint"
    IMAGE_PROMPT = "ip"
    ENHANCE = "enhance"


class MaskModel(StrEnum):
    """Models that find a mask in a picture."""

    U2NET = "u2net"
    U2NETP = "u2netp"
    U2NET_HUMAN_SEG = "u2net_human_seg"
    U2NET_CLOTH_SEG = "u2net_cloth_seg"
    SILUETA = "silueta"
    ISNET_GENERAL_USE = "isnet-general-use"
    ISNET_ANIME = "isnet-anime"
    SAM = "sam"


class ClothCategory(StrEnum):
    """Parts the cloth mask model can select."""

    FULL = "full"
    UPPER = "upper"
    LOWER = "lower"


class SamModel(StrEnum):
    """Sizes of the segment-anything model."""

    VIT_B = "vit_b"
    VIT_L = "vit_l"
    VIT_H = "vit_h"


class EnhanceOrder(StrEnum):
    """When upscale or variation runs within an enhancement."""

    BEFORE = "Before First Enhancement"
    AFTER = "After Last Enhancement"


class EnhancePrompt(StrEnum):
    """Which prompts upscale or variation uses within an enhancement."""

    ORIGINAL = "Original Prompts"
    LAST_FILLED = "Last Filled Enhancement Prompts"


class TaskStatus(StrEnum):
    """States of a task as the API spells them; jobs.py draws the transitions."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    STOP = "stop"
    SKIP = "skip"
    ERROR = "error"

    @property
    def is_final(self) -> bool:
        """True for states that never change again."""
        return self not in (TaskStatus.PENDING, TaskStatus.RUNNING)


class Source(StrEnum):
    """Where a task came from."""

    API = "api"
    WEBUI = "webui"
    CLI = "cli"


MAX_SEED = 2**63 - 1
MAX_RANDOM_SEED = 2**53 - 1  # drawn seeds survive JavaScript's doubles
DEFAULT_VAE = "Default (model)"
NO_MODEL = "None"
STYLE_EXPANSION = "Fooocus V2"
STYLE_RANDOM = "Random Style"

# How long and how strongly an image prompt of each type guides, unless a request says otherwise: (stop, weight).
STOP_AND_WEIGHT_BY_TYPE: Mapping[ControlType, tuple[float, float]] = MappingProxyType(
    {
        ControlType.IMAGE_PROMPT: (0.5, 0.6),
        ControlType.PYRA_CANNY: (0.5, 1.0),
        ControlType.CPDS: (0.5, 1.0),
        ControlType.FACE_SWAP: (0.9, 0.75),
    }
)

ASPECT_RATIOS: tuple[str, ...] = (
    "704*1408", "704*1344", "768*1344", "768*1280", "832*1216", "832*1152", "896*1152", "896*1088", "960*1088",
    "960*1024", "1024*1024", "1024*960", "1088*960", "1088*896", "1152*896", "1152*832", "1216*832", "1280*768",
    "1344*768", "1344*704", "1408*704", "1472*704", "1536*640", "1600*640", "1664*576", "1728*576",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PerformanceFacts:
    """What a performance mode means.

    steps, upscale_steps: model evaluations for a fresh picture, and when an upscaled picture is repainted.
    lora, lora_weight: file name of the distilled LoRA the mode adds, or None.
    forced: request field → value that the mode imposes whatever was asked.
    """

    steps: int
    upscale_steps: int
    lora: str | None = None
    lora_weight: float = 1.0
    forced: Mapping[str, object] = field(default_factory=dict)


def _distilled(sampler: SamplerName, scheduler: SchedulerName) -> Mapping[str, object]:
    """Fields a distilled mode imposes: no guidance, no refiner, neutral scalers, its own sampler."""
    return MappingProxyType(
        {
            "sampler_name": sampler,
            "scheduler_name": scheduler,
            "refiner_model_name": NO_MODEL,
            "sharpness": 0.0,
            "guidance_scale": 1.0,
            "adaptive_cfg": 1.0,
            "refiner_switch": 1.0,
            "adm_scaler_positive": 1.0,
            "adm_scaler_negative": 1.0,
            "adm_scaler_end": 0.0,
        }
    )


FIXED_BY_PERFORMANCE: Mapping[Performance, PerformanceFacts] = MappingProxyType(
    {
        Performance.QUALITY: PerformanceFacts(60, 36),
        Performance.SPEED: PerformanceFacts(30, 18),
        Performance.EXTREME_SPEED: PerformanceFacts(
            8, 8, "sdxl_lcm_lora.safetensors", 1.0, _distilled(SamplerName.LCM, SchedulerName.LCM)
        ),
        Performance.LIGHTNING: PerformanceFacts(
            4, 4, "sdxl_lightning_4step_lora.safetensors", 1.0,
            _distilled(SamplerName.EULER, SchedulerName.SGM_UNIFORM),
        ),
        Performance.HYPER_SD: PerformanceFacts(
            4, 4, "sdxl_hyper_sd_4step_lora.safetensors", 0.8,
            _distilled(SamplerName.DPMPP_SDE_GPU, SchedulerName.KARRAS),
        ),
    }
)  # fmt: skip


def is_distilled(performance: Performance) -> bool:
    """True for the modes that run a distilled LoRA without guidance."""
    return bool(FIXED_BY_PERFORMANCE[performance].forced)
