"""Metadata: what is written is read back, for both schemes, all formats, and other programs' files."""

import io
import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pydantic import BaseModel

from modules.choices import ASPECT_RATIOS, MetadataScheme
from modules.errors import UnreadableImage
from modules.images import FILE_FORMATS
from modules.metadata import LoraFact, Row, RunFacts, clipboard_values, parameters_text, rows
from modules.metadata_files import Embedding, save_arguments, stored_text
from modules.metadata_reader import KnownModels, ReadParameters, read_picture, read_text
from modules.request import GenerationRequest, to_params
from modules.save import save_image

NOW = datetime(2026, 1, 31, 12, 0, 0)
FORMATS = ("png", "jpeg", "webp")
SCHEMES = tuple(MetadataScheme)
TEXT = st.text(max_size=60) | st.sampled_from(
    ['Äpfel, 苹果: "x"\n<lora:a:0.5>', "\nNegative prompt: x\nSteps: 1, Seed: 2"]
)


def facts(**changes: Any) -> RunFacts:
    values: dict[str, Any] = {
        "prompt": 'ein Äpfel, rot: "süß"\n苹果',
        "negative_prompt": "",
        "prompt_expansion": "",
        "styles": ("Fooocus V2", "Misc 'Quoted'"),
        "performance": "Speed",
        "steps": 30,
        "width": 1152,
        "height": 896,
        "guidance_scale": 4.0,
        "sharpness": 2.0,
        "adm_guidance": (1.5, 0.8, 0.3),
        "base_model": "sub/juggernautXL_v8.safetensors",
        "base_model_hash": "0123456789",
        "sampler": "dpmpp_2m_sde_gpu",
        "scheduler": "karras",
        "seed": 2**63 - 1,
        "refiner_switch": 0.5,
        "loras": (LoraFact("a/b.safetensors", 0.1, "abcdef0123"), LoraFact("sdxl_lcm_lora.safetensors", 1.0)),
        "full_prompt": ("cinematic ein Äpfel", "苹果"),
        "full_negative_prompt": ("blurry",),
        "version": "Focale 1.0",
    } | changes
    return RunFacts(**values)


def of_type(annotation: Any, constraints: list[Any]) -> st.SearchStrategy[Any]:
    """Values of a parameter's type within its declared range."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    low = next((mark.ge for mark in constraints if isinstance(mark, annotated_types.Ge)), None)
    high = next((mark.le for mark in constraints if isinstance(mark, annotated_types.Le)), None)
    if origin is Annotated:
        return of_type(arguments[0], [*constraints, *arguments[1:]])
    if origin in (Union, UnionType):
        return st.one_of(*(of_type(argument, constraints) for argument in arguments if argument is not type(None)))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(of_type(arguments[0], []), max_size=4)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return st.sampled_from(list(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return fields_of(annotation)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(0 if low is None else int(low), 4000 if high is None else int(high))
    if annotation is float:
        return st.floats(0 if low is None else float(low), 100 if high is None else float(high))
    assert annotation is str, annotation
    return TEXT


def fields_of(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    special = {
        "aspect_ratios_selection": st.sampled_from(ASPECT_RATIOS),
        "base_model_name": TEXT.filter(bool),
    }
    return st.fixed_dictionaries(
        {},
        optional={
            name: special[name] if name in special else of_type(field.annotation, list(field.metadata))
            for name, field in model.model_fields.items()
        },
    )


def round_trip(embedding: Embedding, output_format: str) -> ReadParameters:
    buffer = io.BytesIO()
    file_format = FILE_FORMATS[output_format]
    Image.new("RGB", (8, 8)).save(buffer, file_format, **save_arguments(embedding, file_format))
    return read_picture(buffer.getvalue())


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=fields_of(GenerationRequest), prompt=TEXT)
def test_any_request_survives_the_picture(
    scheme: MetadataScheme, output_format: str, values: dict[str, Any], prompt: str
) -> None:
    request = GenerationRequest.model_validate(values)
    written = facts(prompt=prompt, full_prompt=(prompt,), request=to_params(request))

    read = round_trip(Embedding(written, scheme), output_format)

    assert read.exact
    assert not read.problems
    assert read.scheme == scheme
    assert GenerationRequest.model_validate(read.request) == request


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_a_stored_request_every_control_is_restored(
    scheme: MetadataScheme, output_format: str, tmp_path: Path
) -> None:
    written = facts(
        refiner_model="r/refiner.safetensors",
        overwrite_switch=12,
        refiner_swap_method="vae",
        adaptive_cfg=5.5,
        freeu=(1.1, 1.2, 0.9, 0.8),
        vae="my.vae.safetensors",
        negative_prompt="Nebel, 雾",
        width=640,
        height=512,
        steps=22,
    )
    known = KnownModels(
        checkpoints=("sub/juggernautXL_v8.safetensors", "r/refiner.safetensors"),
        loras=("a/b.safetensors", "sdxl_lcm_lora.safetensors"),
        vaes=("my.vae.safetensors",),
    )
    embedding = Embedding(written, scheme)
    saved = save_image(
        Image.new("RGB", (8, 8)), root=tmp_path, output_format=output_format, now=NOW, embedding=embedding
    )
    read = read_picture(saved.file, known=known)

    assert (read.scheme, read.exact, read.problems) == (scheme, False, ())
    loras = read.request.pop("loras")
    assert read.request == {
        "prompt": written.prompt,
        "negative_prompt": "Nebel, 雾",
        "style_selections": ["Fooocus V2", "Misc 'Quoted'"],
        "performance_selection": "Speed",
        "overwrite_step": 22,
        "overwrite_width": 640,
        "overwrite_height": 512,
        "guidance_scale": 4.0,
        "sharpness": 2.0,
        "adm_scaler_positive": 1.5,
        "adm_scaler_negative": 0.8,
        "adm_scaler_end": 0.3,
        "base_model_name": "sub/juggernautXL_v8.safetensors",
        "refiner_model_name": "r/refiner.safetensors",
        "refiner_switch": 0.5,
        "overwrite_switch": 12.0,
        "refiner_swap_method": "vae",
        "adaptive_cfg": 5.5,
        "clip_skip": 2,
        "sampler_name": "dpmpp_2m_sde_gpu",
        "scheduler_name": "karras",
        "vae_name": "my.vae.safetensors",
        "image_seed": 2**63 - 1,
        "freeu_enabled": True,
        "freeu_b1": 1.1,
        "freeu_b2": 1.2,
        "freeu_s1": 0.9,
        "freeu_s2": 0.8,
    }
    assert isinstance(loras, list)
    assert len(loras) == 5
    assert loras[0] == {"enabled": True, "model_name": "a/b.safetensors", "weight": 0.1}
    assert all(isinstance(lora, dict) and lora["model_name"] == "None" for lora in loras[1:])


@pytest.mark.parametrize("output_format", FORMATS)
def test_fooocus_rows_are_read_back_under_the_same_keys(output_format: str) -> None:
    embedding = Embedding(facts(request={"prompt": "x"}), MetadataScheme.FOOOCUS)
    read = round_trip(embedding, output_format)
    stored = json.loads(parameters_text(embedding.facts, MetadataScheme.FOOOCUS, with_request=False))
    assert read.rows == stored
    assert list(stored) == sorted(stored)
    assert stored["base_model"] == "juggernautXL_v8"
    assert stored["base_model_hash"] == "0123456789"
    assert stored["loras"] == [["b", 0.1, "abcdef0123"], ["sdxl_lcm_lora", 1.0, ""]]
    assert stored["lora_combined_1"] == "b : 0.1"
    assert stored["full_prompt"] == ["cinematic ein Äpfel", "苹果"]


def test_rows_have_the_labels_keys_and_spelling_of_fooocus() -> None:
    table = [(row.label, row.key, row.value) for row in rows(facts(), MetadataScheme.FOOOCUS)]
    assert table == [
        ("Prompt", "prompt", 'ein Äpfel, rot: "süß"\n苹果'),
        ("Negative Prompt", "negative_prompt", ""),
        ("Fooocus V2 Expansion", "prompt_expansion", ""),
        ("Styles", "styles", "['Fooocus V2', \"Misc 'Quoted'\"]"),
        ("Performance", "performance", "Speed"),
        ("Steps", "steps", 30),
        ("Resolution", "resolution", "(1152, 896)"),
        ("Guidance Scale", "guidance_scale", 4.0),
        ("Sharpness", "sharpness", 2.0),
        ("ADM Guidance", "adm_guidance", "(1.5, 0.8, 0.3)"),
        ("Base Model", "base_model", "sub/juggernautXL_v8.safetensors"),
        ("Refiner Model", "refiner_model", "None"),
        ("Refiner Switch", "refiner_switch", 0.5),
        ("CLIP Skip", "clip_skip", 2),
        ("Sampler", "sampler", "dpmpp_2m_sde_gpu"),
        ("Scheduler", "scheduler", "karras"),
        ("VAE", "vae", "Default (model)"),
        ("Seed", "seed", str(2**63 - 1)),
        ("LoRA 1", "lora_combined_1", "a/b.safetensors : 0.1"),
        ("LoRA 2", "lora_combined_2", "sdxl_lcm_lora.safetensors : 1.0"),
        ("Metadata Scheme", "metadata_scheme", "fooocus"),
        ("Version", "version", "Focale 1.0"),
    ]


def test_optional_rows_appear_only_when_used() -> None:
    def keys(**changes: Any) -> set[str]:
        return {row.key for row in rows(facts(**changes), None)}

    plain = keys()
    assert keys(overwrite_switch=5, refiner_swap_method="vae") == plain  # without a refiner they mean nothing
    with_refiner = keys(refiner_model="r.safetensors", overwrite_switch=5, refiner_swap_method="vae")
    assert with_refiner - plain == {"overwrite_switch", "refiner_swap_method"}
    assert keys(adaptive_cfg=6.0) - plain == {"adaptive_cfg"}
    assert keys(freeu=(1, 1, 1, 1)) - plain == {"freeu"}
    assert plain - keys(clip_skip=1) == {"clip_skip"}
    assert keys(extra=(Row("Upscale", "upscale", "2x"),)) - plain == {"upscale"}


def test_a1111_text_is_laid_out_as_a1111_does() -> None:
    text = parameters_text(facts(prompt="a cat", scheduler="karras"), MetadataScheme.A1111, with_request=False)
    assert text == (
        "cinematic ein Äpfel, 苹果\nNegative prompt: blurry\n"
        "Steps: 30, Sampler: DPM++ 2M SDE Karras, Seed: 9223372036854775807, Size: 1152x896, CFG scale: 4.0, "
        'Sharpness: 2.0, ADM Guidance: "(1.5, 0.8, 0.3)", Model: juggernautXL_v8, Model hash: 0123456789, '
        "Performance: Speed, Scheduler: karras, VAE: Default (model), Raw prompt: a cat, Raw negative prompt: , "
        'Clip skip: 2, Refiner Switch: 0.5, Lora hashes: "b: abcdef0123, sdxl_lcm_lora: ", '
        'Lora weights: "b: 0.1, sdxl_lcm_lora: 1.0", '
        "Styles: \"['Fooocus V2', \\\"Misc 'Quoted'\\\"]\", Version: Focale 1.0"
    )


@pytest.mark.parametrize(("sampler", "shown"), [("euler", "Euler"), ("dpm_2", "DPM2 Karras"), ("ddpm", "ddpm")])
def test_karras_is_added_where_a1111_adds_it(sampler: str, shown: str) -> None:
    text = parameters_text(facts(sampler=sampler), MetadataScheme.A1111, with_request=False)
    assert f"Sampler: {shown}, " in text
    assert read_text(text).request["sampler_name"] == sampler


def test_png_carries_the_chunks_other_programs_look_for() -> None:
    buffer = io.BytesIO()
    embedding = Embedding(facts(request={"prompt": "x"}), MetadataScheme.A1111)
    Image.new("RGB", (4, 4)).save(buffer, "PNG", **save_arguments(embedding, "PNG"))
    with Image.open(buffer) as image:
        assert set(image.info) == {"parameters", "fooocus_scheme", "focale_request"}
        assert image.info["fooocus_scheme"] == "a1111"
        assert image.info["parameters"] == parameters_text(embedding.facts, embedding.scheme, with_request=False)


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_exif_holds_text_scheme_and_version(file_format: Literal["JPEG", "WEBP"]) -> None:
    buffer = io.BytesIO()
    embedding = Embedding(facts(), MetadataScheme.FOOOCUS)
    Image.new("RGB", (4, 4)).save(buffer, file_format, **save_arguments(embedding, file_format))
    with Image.open(buffer) as image:
        exif = image.getexif()
        directory = exif.get_ifd(0x8769)
        text = parameters_text(embedding.facts, embedding.scheme, with_request=False)
        assert directory[0x9286] == b"UNICODE\0" + text.encode("utf-16-be")
        assert directory[0x927C] == b"fooocus"
        assert (exif[0x9286], exif[0x0131]) == (text, "Focale 1.0")  # where Fooocus itself looks


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("length", [8_000, 15_000, 30_000, 60_000, 100_000])
def test_the_longest_prompts_survive_every_format(scheme: MetadataScheme, output_format: str, length: int) -> None:
    prompt = "x苹" * (length // 2)
    request = GenerationRequest(prompt=prompt, negative_prompt=prompt)
    written = facts(prompt=prompt, negative_prompt=prompt, full_prompt=(prompt,), request=to_params(request))
    read = round_trip(Embedding(written, scheme), output_format)
    assert read.exact
    assert GenerationRequest.model_validate(read.request) == request


COMMENTS = {
    "unicode, big endian": b"UNICODE\0" + "Ä 苹果".encode("utf-16-be"),
    "unicode, little endian": b"UNICODE\0" + "Ä 苹果 {'a': 1}".encode("utf-16-le"),
    "unicode with a mark": b"UNICODE\0" + "Ä 苹果".encode("utf-16"),
    "ascii prefix": b"ASCII\0\0\0" + "Ä 苹果".encode(),
    "no prefix": "Ä 苹果".encode() + b"\0\0",
    "undefined": b"\0" * 8 + "Ä 苹果".encode(),
}


@pytest.mark.parametrize("spelling", COMMENTS)
@pytest.mark.parametrize("directory", ["exif", "main"])
def test_every_spelling_of_a_user_comment_is_read(spelling: str, directory: str) -> None:
    exif = Image.Exif()
    (exif.get_ifd(0x8769) if directory == "exif" else exif)[0x9286] = COMMENTS[spelling]
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG", exif=exif)
    with Image.open(buffer) as image:
        text = stored_text(image).text
    assert text is not None
    assert text.startswith("Ä 苹果")


def test_log_json_pasted_back_is_the_request() -> None:
    request = GenerationRequest(prompt="Ä 苹果", image_number=4, image_seed=7)
    values = clipboard_values(facts(seed=9, request=to_params(request)), None)
    read = read_text(json.dumps(values, ensure_ascii=False))
    assert read.exact
    assert GenerationRequest.model_validate(read.request) == request
    one = read.of_this_picture()
    assert (one["image_seed"], one["image_number"], one["prompt"]) == (9, 1, "Ä 苹果")


def test_prompts_that_depend_on_the_number_of_the_picture_become_the_text_that_was_used() -> None:
    request = GenerationRequest(prompt="a [[red, blue]] cat", image_number=2, image_seed=7)
    read = read_text(json.dumps(clipboard_values(facts(prompt="a blue cat", request=to_params(request)), None)))
    assert read.request["prompt"] == "a [[red, blue]] cat"
    assert read.of_this_picture()["prompt"] == "a blue cat"


def test_fooocus_log_json_with_keys_or_labels_is_understood() -> None:
    by_label = {row.label: row.value for row in rows(facts(), MetadataScheme.FOOOCUS)}
    by_key = {row.key: row.value for row in rows(facts(), MetadataScheme.FOOOCUS)}
    read = read_text(json.dumps(by_label))
    assert read.request == read_text(json.dumps(by_key)).request == read_text(str(by_key)).request
    assert read.scheme == "fooocus"
    assert read.request["image_seed"] == 2**63 - 1
    assert read.request["aspect_ratios_selection"] == "1152*896"
    assert read.request["overwrite_step"] == -1
    assert read.request["freeu_enabled"] is False


def test_a_request_or_record_of_the_api_is_understood() -> None:
    params = to_params(GenerationRequest(prompt="x", image_number=3, image_seed=5))
    for text in (json.dumps(params), json.dumps({"task_id": "a" * 32, "req_params": params})):
        read = read_text(text)
        assert read.scheme == "focale"
        assert read.request == params == read.of_this_picture()


A1111 = """masterpiece, a cat, (fluffy:1.2), <lora:add_detail:0.5>
second line
Negative prompt: blurry,
low quality
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 123, Size: 512x768, Model hash: aa, \
Model: dreamshaper, Denoising strength: 0.4, Clip skip: 1, Lora hashes: "add_detail: 7c6bad76eb54", Version: v1.9.4"""


def test_plain_a1111_text_is_understood() -> None:
    read = read_text(A1111.replace("\n", "\r\n"), known=KnownModels(checkpoints=("x/DreamShaper.safetensors",)))
    assert read.scheme == "a1111"
    assert read.problems == ()
    assert read.request["prompt"] == "masterpiece, a cat, (fluffy:1.2), <lora:add_detail:0.5>\nsecond line"
    assert read.request["negative_prompt"] == "blurry,\nlow quality"
    sampling = {"sampler_name": "dpmpp_2m", "scheduler_name": "karras", "guidance_scale": 7.0, "image_seed": 123}
    assert sampling.items() <= read.request.items()
    assert (read.request["overwrite_width"], read.request["overwrite_height"]) == (512, 768)
    assert (read.request["overwrite_step"], read.request["performance_selection"]) == (25, "Speed")
    assert (read.request["base_model_name"], read.request["style_selections"]) == (
        "x/DreamShaper.safetensors",
        [],
    )


def test_a1111_jpeg_and_png_are_understood() -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", A1111)
    png, jpeg = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG", pnginfo=chunks)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    Image.new("RGB", (4, 4)).save(jpeg, "JPEG", exif=exif)
    assert read_picture(png.getvalue()).request == read_picture(jpeg.getvalue()).request == read_text(A1111).request


def test_comfyui_picture_is_understood() -> None:
    graph = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 77, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal",
                "positive": ["6", 0], "negative": ["9", 0], "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sdxl.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 1024, "height": 1024}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0]}},
        "8": {"class_type": "String", "inputs": {"string": "fog"}},
        "9": {"class_type": "ConditioningCombine", "inputs": {"conditioning": ["7", 0]}},
    }  # fmt: skip
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", json.dumps(graph))
    chunks.add_text("workflow", "{}")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG", pnginfo=chunks)
    read = read_picture(buffer.getvalue())
    assert read.scheme == "comfyui"
    wanted = {
        "prompt": "a fox", "negative_prompt": "fog", "image_seed": 77, "guidance_scale": 8.0, "sampler_name": "euler",
        "scheduler_name": "normal", "aspect_ratios_selection": "1024*1024", "base_model_name": "sdxl.safetensors",
        "style_selections": [], "overwrite_step": 20,
    }  # fmt: skip
    assert wanted.items() <= read.request.items()


def test_unknown_models_are_told_and_left_alone() -> None:
    known = KnownModels(checkpoints=("other.safetensors",), loras=("other.safetensors",))
    read = read_text(parameters_text(facts(), MetadataScheme.FOOOCUS, with_request=False), known=known)
    assert "base_model_name" not in read.request
    assert any("juggernautXL_v8" in problem for problem in read.problems)
    assert any("'b'" in problem for problem in read.problems)
    assert read.request["image_seed"] == 2**63 - 1


def test_wrong_values_are_told_and_the_rest_is_used() -> None:
    read = read_text(
        '{"prompt": "x", "guidance_scale": "much", "sampler": "warp", "steps": "no", "styles": "__import__"}'
    )
    assert read.request["prompt"] == "x"
    assert not {"guidance_scale", "sampler_name", "overwrite_step", "style_selections"} & set(read.request)
    assert len(read.problems) == 3


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch hacked')",
        "{'prompt': __import__('os').system('touch hacked')}",
        '{"styles": "__import__(\'os\').system(\'touch hacked\')", "adm_guidance": "(exit(), 1, 1)"}',
        "{" * 100_000,
        "[" * 100_000,
        '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"seed": ' + "9" * 10_000 + "}",
        '{"prompt": ["a"], "resolution": {"w": 1}, "loras": [[], [1], "x", {}], "lora_combined_1": []}',
        '{"focale": {"prompt": 5, "image_number": "many"}}',
        '{"focale": "no", "req_params": {"x": 1}}',
        '{"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "seed": {}}}}',
        "Steps: , Seed: x, Size: 9x9x9",
        "",
        "{}",
        "null",
    ],
)
def test_junk_is_never_run_and_never_raises(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read = read_text(text)
    GenerationRequest.model_validate(read.request)
    assert list(tmp_path.iterdir()) == []


KEYS = st.sampled_from(["prompt", "loras", "steps", "focale", "styles", "seed", "inputs", "class_type", "freeu"])
JUNK = st.recursive(
    st.none() | st.text() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.text(max_size=200) | JUNK.map(json.dumps))
def test_any_text_is_survived(text: str) -> None:
    GenerationRequest.model_validate(read_text(text).request)


def test_pictures_without_parameters_and_files_that_are_none() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    read = read_picture(buffer.getvalue())
    assert (read.scheme, read.request) == (None, {})
    assert "no generation parameters" in read.problems[0]
    with pytest.raises(UnreadableImage, match="not a PNG"):
        read_picture(b"text")
