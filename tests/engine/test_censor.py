"""Unsafe pictures: what the classifiers say, and what a run makes of it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from transformers import CLIPConfig

from modules.control import Control
from modules.engine.censor import NsfwClassifier, NsfwScores, blacked_out
from modules.engine.safety_checker import SafetyChecker, near_unsafe_concept
from modules.errors import ModelFileUnusable
from modules.events import ImageSaved, Noticed, Progress
from modules.generate import EngineWorkbench
from modules.record import Record
from modules.request import GenerationRequest, normalised, to_params
from modules.settings import ROOT, Settings
from modules.tools import SHIPPED, Toolbox
from tests.tiny_sdxl import write_tiny

pytestmark = pytest.mark.engine

DATA = Path(__file__).parents[1] / "data"
CONCEPTS, SPECIAL = 5, 2


def photographs() -> list[Image.Image]:
    return [Image.open(DATA / name).convert("RGB") for name in ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")]


# -- the classifier that ships -----------------------------------------------------------------------------------


def test_ordinary_photographs_and_drawings_are_safe():
    classifier = NsfwClassifier(SHIPPED)
    house = Image.new("RGB", (300, 200), "lightblue")
    draw = ImageDraw.Draw(house)
    draw.rectangle((90, 100, 210, 180), "wheat", "black", 3)
    draw.polygon([(80, 100), (150, 40), (220, 100)], "firebrick", "black")
    assert classifier.find_unsafe([*photographs(), house]) == [False] * 4
    scores = classifier(photographs()[2])
    assert scores.neutral > 0.95
    assert sum(vars(scores).values()) == pytest.approx(1, abs=1e-5)


def test_flat_drawings_are_told_from_photographs():
    classifier = NsfwClassifier(SHIPPED)
    flat = [ImageOps.posterize(photograph.filter(ImageFilter.ModeFilter(7)), 2) for photograph in photographs()]
    assert min(classifier(drawing).drawn for drawing in flat) > 0.5
    assert max(classifier(photograph).drawn for photograph in photographs()) < 0.1


@pytest.mark.parametrize(
    ("scores", "is_unsafe"),
    [
        (NsfwScores(drawing=0, hentai=0, neutral=0.4, porn=0.6, sexy=0), True),
        (NsfwScores(drawing=0.4, hentai=0.3, neutral=0, porn=0.3, sexy=0), True),
        (NsfwScores(drawing=0.1, hentai=0.2, neutral=0.1, porn=0.2, sexy=0.4), False),
        (NsfwScores(drawing=0, hentai=0, neutral=0.1, porn=0.1, sexy=0.8), False),
    ],
)
def test_pornographic_classes_count_together_and_suggestive_ones_do_not(
    scores: NsfwScores, is_unsafe: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(NsfwClassifier, "__call__", lambda self, image: scores)
    assert NsfwClassifier(SHIPPED).find_unsafe(photographs()[:1]) == [is_unsafe]


# -- the checker of Stable Diffusion -----------------------------------------------------------------------------


def write_checker(path: Path) -> StableDiffusionSafetyChecker:
    """A tiny random checker of diffusers, written with the keys of the published file."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    for name, count in (("concept_embeds", CONCEPTS), ("special_care_embeds", SPECIAL)):
        setattr(checker, name, torch.nn.Parameter(torch.randn(count, 16), requires_grad=False))
        setattr(checker, f"{name}_weights", torch.nn.Parameter(torch.full((count,), 0.3), requires_grad=False))
    torch.save({published(key): value for key, value in checker.state_dict().items()}, path)
    return checker


def published(key: str) -> str:
    """The name of a weight in the published file, whatever the libraries call it today."""
    inner = key.removeprefix("vision_model.").removeprefix("vision_model.")
    return f"vision_model.vision_model.{inner}" if key.startswith("vision_model.") else key


def noise_pictures(count: int) -> list[Image.Image]:
    """Pictures of random colours and coarseness, some of them not square."""
    random = np.random.default_rng(1)
    pictures = []
    for index in range(count):
        coarse = random.integers(0, 256, (2 + index % 3, 2 + index % 2, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(coarse).resize((32 + 16 * (index % 2), 32), Image.Resampling.NEAREST))
    return pictures


def test_our_checker_decides_as_the_one_of_diffusers(tmp_path: Path):
    reference = write_checker(tmp_path / "pytorch_model.bin")
    ours = SafetyChecker(tmp_path / "pytorch_model.bin")
    pictures = noise_pictures(12)
    pixels = torch.cat([clip_pixels(picture) for picture in pictures])
    with torch.inference_mode():
        pooled = reference.vision_model(pixels)[1]
        embeddings = torch.nn.functional.normalize(reference.visual_projection(pooled))
        # Limits in the middle of what these pictures score, so that both answers occur.
        cosines = embeddings @ torch.nn.functional.normalize(reference.concept_embeds).T
        limit = cosines.max(dim=1).values.median().item() + 0.001
        for checker_limits in (reference.concept_embeds_weights, ours.unsafe_limits):
            checker_limits.fill_(limit)
        _, expected = reference(clip_input=pixels, images=[np.zeros((1, 1, 3)) for _ in pictures])
        assert torch.allclose(torch.cat([ours._embedding(picture) for picture in pictures]), embeddings, atol=1e-5)
    assert 0 < sum(expected) < len(pictures)
    assert ours.find_unsafe(pictures) == [bool(answer) for answer in expected]


def clip_pixels(picture: Image.Image) -> Tensor:
    """(1, 3, 32, 32) centre crop, normalised by CLIP's means and deviations."""
    left = (picture.width - 32) // 2
    pixels = torch.from_numpy(np.array(picture.crop((left, 0, left + 32, 32)))).float() / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((pixels - mean) / std).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("unsafe", "special", "answer"),
    [
        ([0.0004, -0.2], [-0.1], False),
        ([0.0006, -0.2], [-0.1], True),
        ([-0.009, -0.2], [-0.1], False),
        ([-0.009, -0.2], [0.002], True),
        ([-0.011, -0.2], [0.5], False),
    ],
)
def test_scores_are_rounded_and_special_concepts_make_the_checker_stricter(
    unsafe: list[float], special: list[float], answer: bool
):
    assert near_unsafe_concept(torch.tensor(unsafe), torch.tensor(special)) is answer


def test_a_checker_of_the_users_is_asked_instead(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    write_checker(settings.paths.safety_checker / "stable-diffusion-safety-checker.bin")
    asked = []
    monkeypatch.setattr(SafetyChecker, "find_unsafe", lambda self, images: asked.append(len(images)) or [True, False])
    assert Toolbox(settings.paths).find_unsafe(photographs()[:2]) == [True, False]
    assert asked == [2]


def test_a_file_that_is_no_checker_is_refused(settings: Settings):
    torch.save({"weight": torch.ones(2)}, settings.paths.safety_checker / "pytorch_model.bin")
    with pytest.raises(ModelFileUnusable, match="no safety checker"):
        Toolbox(settings.paths).find_unsafe(photographs())


# -- in a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> EngineWorkbench:
    root = tmp_path_factory.mktemp("focale")
    shutil.copytree(ROOT / "models" / "tokenizer", root / "models" / "tokenizer")
    settings = Settings.load(["--port", "0", "--temp-path", str(root / "temp"), "--always-cpu"], env={}, root=root)
    settings.prepare()
    write_tiny(settings.paths.checkpoints[0] / "tiny.safetensors")
    return EngineWorkbench(settings)


def drawn(bench: EngineWorkbench, **values: object) -> tuple[list[np.ndarray], list[object]]:
    """Pixels of the files of a task, and all its events."""
    request = GenerationRequest.model_validate(
        {
            "base_model_name": "tiny.safetensors", "aspect_ratios_selection": "64*64", "overwrite_step": 2,
            "style_selections": [], "loras": [], "image_seed": 7, "image_number": 2, **values,
        }
    )  # fmt: skip
    record = Record(task_id=f"task-{len(values)}", req_params=to_params(normalised(request)))
    events = list(bench.run(record, Control()))
    files = [bench.settings.paths.outputs / event.path for event in events if isinstance(event, ImageSaved)]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files], events


def test_an_unsafe_picture_becomes_black_and_the_task_says_so(bench: EngineWorkbench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench.tools, "find_unsafe", lambda images: [False, True][: len(images)])
    pictures, events = drawn(bench, black_out_nsfw=True)
    assert pictures[0].any()
    assert not pictures[1].any()
    assert pictures[1].shape == pictures[0].shape
    assert [event.message for event in events if isinstance(event, Noticed)][-1] == (
        "Image 2 was found unsafe and is blacked out."
    )
    assert not any(event.preview for event in events if isinstance(event, Progress))


def test_safe_pictures_are_the_same_with_and_without_the_check(bench: EngineWorkbench):
    (checked, _), (plain, events) = drawn(bench, black_out_nsfw=True), drawn(bench, black_out_nsfw=False, tag="x")
    assert all(np.array_equal(one, other) for one, other in zip(checked, plain, strict=True))
    assert any(event.preview for event in events if isinstance(event, Progress))


def test_a_black_picture_keeps_the_size():
    black = blacked_out(Image.new("RGB", (30, 20), "white"))
    assert (black.size, black.getextrema()) == ((30, 20), ((0, 0), (0, 0), (0, 0)))


def test_unloading_frees_the_networks_and_the_next_task_loads_them(bench: EngineWorkbench):
    bench.tools.find_unsafe(photographs()[:1])
    assert bench.call("unload_models", {}) is None
    assert bench.store.memory_mib() == 0
    assert "_classifier" not in vars(bench.tools)
    assert len(drawn(bench, black_out_nsfw=True)[0]) == 2


def test_the_workbench_answers_the_tools(bench: EngineWorkbench):
    assert bench.call("describe", {"image_path": str(DATA / "chelsea.jpg"), "kinds": ["Anime"]}).startswith("cat, ")
    mask = Path(str(bench.call("generate_mask", {"image_path": str(DATA / "chelsea.jpg"), "mask_model": "u2netp"})))
    assert mask.is_relative_to(bench.settings.paths.temp)
