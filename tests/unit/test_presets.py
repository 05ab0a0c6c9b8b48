"""Presets: the shipped ones, reading, precedence, writing."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.choices import Performance, SamplerName, SchedulerName
from modules.errors import InvalidRequest, UnknownName
from modules.params import Lora
from modules.presets import (
    ALLOWED_KEYS,
    FIELD_OF_KEY,
    Preset,
    PresetFolder,
    apply_preset,
    is_old_default,
    load_preset,
    preset_entries,
    preset_names,
    read_preset,
    save_preset,
)
from modules.request import GenerationRequest

SHIPPED = Path(__file__).parents[2] / "presets"
NAMES = [
    "anime", "default", "focale", "lcm", "lightning", "playground_v2.5", "pony_v6", "realistic", "sai",
]  # fmt: skip
OFFSET = "sd_xl_offset_example-lora_1.0.safetensors"
FILM = "SDXL_FILM_PHOTOGRAPHY_STYLE_V1.safetensors"
DEFAULTS = GenerationRequest()


def write(folder: Path, name: str, **entries: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(entries))


def test_initial_comes_first_and_the_others_by_name():
    names = preset_names(SHIPPED)
    assert names[0] == "initial"
    assert names[1:] == sorted(names[1:])
    assert set(NAMES) <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_presets_load_without_problems_and_make_a_valid_request(name):
    preset = load_preset(SHIPPED, name)
    request = apply_preset(DEFAULTS, preset, defaults=DEFAULTS)
    assert preset.problems == ()
    assert request.base_model_name == preset.values["default_model"]
    assert request.prompt == ""
    assert request.sharpness == 2.0
    assert len(request.loras) == 5


JUGGERNAUT = "juggernautXL_v8Rundiffusion.safetensors"
OLDER_JUGGERNAUTS = tuple(
    f"juggernautXL_{version}Rundiffusion.safetensors" for version in ("version8", "version7", "v7", "version6", "v6")
)
V2, ENHANCE, SHARP = "Fooocus V2", "Fooocus Enhance", "Fooocus Sharp"
SDE, KARRAS = "dpmpp_2m_sde_gpu", "karras"


@pytest.mark.parametrize(
    ("name", "model", "refiner", "switch", "lora", "cfg", "sampler", "scheduler", "performance", "size", "styles",
     "older"),
    [
        ("default", JUGGERNAUT, "None", 0.5, (OFFSET, 0.1), 4, SDE, KARRAS, "Speed", "1152*896",
         (V2, ENHANCE, SHARP), OLDER_JUGGERNAUTS),
        ("anime", "animaPencilXL_v500.safetensors", "None", 0.5, ("None", 1), 6, SDE, KARRAS, "Speed", "896*1152",
         (V2, "Fooocus Semi Realistic", "Fooocus Masterpiece"),
         tuple(f"animaPencilXL_v{number}.safetensors" for number in (400, 310, 300, 260, 210, 200, 100))),
        ("lcm", JUGGERNAUT, "None", 0.5, ("None", 1), 4, SDE, KARRAS, "Extreme Speed", "1152*896",
         (V2, ENHANCE, SHARP), OLDER_JUGGERNAUTS),
        ("lightning", JUGGERNAUT, "None", 0.5, ("None", 1), 4, SDE, KARRAS, "Lightning", "1152*896",
         (V2, ENHANCE, SHARP), OLDER_JUGGERNAUTS),
        ("playground_v2.5", "playground-v2.5-1024px-aesthetic.fp16.safetensors", "None", 0.5, ("None", 1), 2,
         "dpmpp_2m", "edm_playground_v2.5", "Speed", "1024*1024", (V2,), ()),
        ("pony_v6", "ponyDiffusionV6XL.safetensors", "None", 0.5, ("None", 1), 7, SDE, KARRAS, "Speed", "896*1152",
         ("Fooocus Pony",), ()),
        ("realistic", "realisticStockPhoto_v20.safetensors", "None", 0.5, (FILM, 0.25), 3, SDE, KARRAS, "Speed",
         "896*1152", (V2, "Fooocus Photograph", "Fooocus Negative"), ("realisticStockPhoto_v10.safetensors",)),
        ("sai", "sd_xl_base_1.0_0.9vae.safetensors", "sd_xl_refiner_1.0_0.9vae.safetensors", 0.75, (OFFSET, 0.5), 7,
         SDE, KARRAS, "Speed", "1152*896", (V2, "Fooocus Cinematic"), ()),
    ],
)  # fmt: skip
def test_shipped_presets_have_the_values_users_know(
    name, model, refiner, switch, lora, cfg, sampler, scheduler, performance, size, styles, older
):
    preset = load_preset(SHIPPED, name)
    request = apply_preset(DEFAULTS, preset, defaults=DEFAULTS)
    first, *others = request.loras
    assert (request.base_model_name, request.refiner_model_name, request.refiner_switch) == (model, refiner, switch)
    assert (first.enabled, first.model_name, first.weight) == (True, *lora)
    assert [(row.enabled, row.model_name, row.weight) for row in others] == [(True, "None", 1.0)] * 4
    assert (request.guidance_scale, request.sharpness) == (cfg, 2)
    assert (request.sampler_name, request.scheduler_name) == (sampler, scheduler)
    assert (request.performance_selection, request.aspect_ratios_selection) == (performance, size)
    assert request.style_selections == styles
    assert preset.previous_models == older
    assert preset.values.get("default_overwrite_step") == (None if name == "lightning" else -1)
    pony = name == "pony_v6"
    assert request.vae_name == ("ponyDiffusionV6XL_vae.safetensors" if pony else "Default (model)")
    assert (request.inpaint_engine == "None") == (name in ("pony_v6", "playground_v2.5"))
    assert bool(request.negative_prompt) == (name == "realistic")


def test_the_eight_presets_of_fooocus_ship_and_one_for_the_demo_model():
    assert preset_names(SHIPPED) == ["initial", *sorted(NAMES)]


def test_every_model_a_shipped_preset_names_has_a_source():
    for name in NAMES:
        preset = load_preset(SHIPPED, name)
        request = apply_preset(DEFAULTS, preset, defaults=DEFAULTS)
        named = {
            request.base_model_name,
            request.refiner_model_name,
            request.vae_name,
            request.loras[0].model_name,
        }
        sources = {download.file: download.url for download in preset.downloads}
        built_in = {"None", "Default (model)", "focale-tiny.safetensors"}
        assert named - built_in == set(sources), name
        for file, url in sources.items():
            assert url.startswith("https://huggingface.co/")
            assert "/resolve/main/" in url
            assert url.endswith(f"/{file}")


HUB_FOLDERS = {
    JUGGERNAUT: "lllyasviel/fav_models", "realisticStockPhoto_v20.safetensors": "lllyasviel/fav_models",
    "animaPencilXL_v500.safetensors": "mashb1t/fav_models", FILM: "mashb1t/fav_models",
    "playground-v2.5-1024px-aesthetic.fp16.safetensors": "mashb1t/fav_models",
    "ponyDiffusionV6XL.safetensors": "mashb1t/fav_models", "ponyDiffusionV6XL_vae.safetensors": "mashb1t/fav_models",
    "sd_xl_base_1.0_0.9vae.safetensors": "stabilityai/stable-diffusion-xl-base-1.0",
    OFFSET: "stabilityai/stable-diffusion-xl-base-1.0",
    "sd_xl_refiner_1.0_0.9vae.safetensors": "stabilityai/stable-diffusion-xl-refiner-1.0",
}  # fmt: skip


def test_files_come_from_where_they_are_published():
    for name in NAMES:
        for download in load_preset(SHIPPED, name).downloads:
            folder = HUB_FOLDERS[download.file]
            middle = "fav/" if folder.endswith("fav_models") else ""
            assert download.url == f"https://huggingface.co/{folder}/resolve/main/{middle}{download.file}"


def test_a_folder_of_presets_is_read_again_when_a_file_changes(tmp_path, caplog):
    folder = PresetFolder(tmp_path)
    assert folder.presets() == []
    write(tmp_path, "mine", default_model="a.safetensors", previous_default_models=["old.safetensors"])
    (tmp_path / "broken.json").write_text("{")
    assert folder.predecessors() == {"a.safetensors": ("old.safetensors",)}
    assert [preset.name for preset in folder.presets()] == ["broken", "mine"]
    assert caplog.text.count("broken.json cannot be read") == 1
    write(tmp_path, "mine", default_model="b.safetensors", previous_default_models=["older.safetensors"])
    assert folder.predecessors() == {"b.safetensors": ("older.safetensors",)}
    (tmp_path / "mine.json").unlink()
    assert folder.predecessors() == {}


def test_downloads_say_which_folder_they_belong_in():
    folders = {download.file: download.folder for download in load_preset(SHIPPED, "pony_v6").downloads}
    assert folders == {
        "ponyDiffusionV6XL.safetensors": "checkpoints", "ponyDiffusionV6XL_vae.safetensors": "vae",
    }  # fmt: skip


def test_initial_changes_nothing():
    request = GenerationRequest(prompt="fox")
    assert apply_preset(request, load_preset(SHIPPED, "initial"), defaults=DEFAULTS) is request


@pytest.mark.parametrize("name", ["anim", "../default", "styles/sai", "/etc/passwd", "", "DEFAULT"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(UnknownName) as caught:
        load_preset(SHIPPED, name)
    assert caught.value.field == ("preset",)


def test_an_unknown_name_gets_near_matches():
    with pytest.raises(UnknownName) as caught:
        load_preset(SHIPPED, "realstic")
    assert caught.value.near[0] == "realistic"


def test_a_sent_value_wins_over_the_preset():
    request = GenerationRequest(guidance_scale=9.5, prompt="fox")
    applied = apply_preset(request, load_preset(SHIPPED, "anime"), defaults=DEFAULTS)
    assert (applied.guidance_scale, applied.prompt) == (9.5, "fox")
    assert applied.aspect_ratios_selection == "896*1152"


def test_the_preset_wins_over_a_sent_value_that_equals_the_default():
    request = GenerationRequest.model_validate({**DEFAULTS.model_dump(mode="json"), "sharpness": 5})
    applied = apply_preset(request, load_preset(SHIPPED, "playground_v2.5"), defaults=DEFAULTS)
    assert (applied.sampler_name, applied.guidance_scale) == (SamplerName.DPMPP_2M, 2.0)
    assert applied.scheduler_name == SchedulerName.EDM_PLAYGROUND
    assert applied.sharpness == 5


def test_the_defaults_of_the_server_decide_what_equals_the_default():
    defaults = GenerationRequest(guidance_scale=7.0)
    applied = apply_preset(
        GenerationRequest(guidance_scale=7.0), Preset("x", {"default_cfg_scale": 3.0}), defaults=defaults
    )
    assert applied.guidance_scale == 3.0


def test_a_key_the_preset_lacks_leaves_its_field_alone():
    preset = read_preset("x", {"default_cfg_scale": 3})
    assert preset.request_fields == {"guidance_scale": 3.0}


def test_loras_and_both_guidance_keys_reach_their_own_fields():
    preset = read_preset(
        "x", {"default_loras": [["a.safetensors", 0.5]], "default_cfg_scale": 3, "default_cfg_tsnr": 8}
    )
    applied = apply_preset(DEFAULTS, preset, defaults=DEFAULTS)
    assert list(applied.loras) == [Lora(enabled=True, model_name="a.safetensors", weight=0.5)]
    assert (applied.guidance_scale, applied.adaptive_cfg) == (3.0, 8.0)


def test_what_a_preset_cannot_set_is_reported_and_left_out(tmp_path, caplog):
    write(tmp_path, "x", path_outputs="/tmp", default_sampler="nope", default_cfg_scale=3)
    preset = load_preset(tmp_path, "x")
    assert dict(preset.values) == {"default_cfg_scale": 3.0}
    assert [problem.split(" ")[0] for problem in preset.problems] == ["path_outputs", "default_sampler"]
    assert "Preset x" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_file_without_an_object_is_an_error(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InvalidRequest, match=r"x\.json"):
        load_preset(tmp_path, "x")


def test_a_predecessor_stands_in_while_the_model_is_absent():
    preset = load_preset(SHIPPED, "default")
    new, old = "juggernautXL_v8Rundiffusion.safetensors", "juggernautXL_v6Rundiffusion.safetensors"
    assert preset.model([]) == new
    assert preset.model([old]) == old
    assert preset.model([old, new]) == new
    assert preset.model([old], always_new=True) == new
    assert Preset("initial").model([old]) is None


def test_every_default_of_a_shipped_preset_is_known_as_one():
    for name in set(NAMES) - {"focale"}:
        preset = load_preset(SHIPPED, name)
        assert all(is_old_default(model) for model in (preset.values["default_model"], *preset.previous_models))
    assert not is_old_default("myOwnModel.safetensors")


REQUESTS = st.builds(
    GenerationRequest,
    prompt=st.text(max_size=20),
    style_selections=st.lists(st.sampled_from(["Fooocus V2", "SAI Anime"]), unique=True),
    performance_selection=st.sampled_from(Performance),
    guidance_scale=st.floats(1, 30),
    clip_skip=st.integers(1, 12),
    sampler_name=st.sampled_from(SamplerName),
    loras=st.lists(
        st.builds(Lora, enabled=st.booleans(), model_name=st.just("a.pt"), weight=st.floats(-2, 2)),
        max_size=5,
    ),
)


@given(REQUESTS)
def test_a_request_survives_the_way_through_a_preset(request):
    preset = read_preset("x", json.loads(json.dumps(preset_entries(request))))
    applied = apply_preset(GenerationRequest(), preset, defaults=DEFAULTS)
    assert preset.problems == ()
    for name in FIELD_OF_KEY.values():
        assert getattr(applied, name) == getattr(request, name), name


def test_a_saved_preset_can_be_loaded(tmp_path):
    save_preset(tmp_path / "presets", "mein Stil", {"default_prompt": "größer"})
    assert load_preset(tmp_path / "presets", "mein Stil").request_fields == {"prompt": "größer"}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "initial", "Initial", "x ", "a" * 81])
def test_a_preset_is_not_saved_under_an_unusable_name(tmp_path, name):
    with pytest.raises(InvalidRequest):
        save_preset(tmp_path, name, {})
    assert list(tmp_path.iterdir()) == []


def test_a_preset_is_overwritten_only_on_purpose(tmp_path):
    save_preset(tmp_path, "x", {"default_cfg_scale": 1})
    with pytest.raises(InvalidRequest, match="already"):
        save_preset(tmp_path, "x", {"default_cfg_scale": 2})
    save_preset(tmp_path, "x", {"default_cfg_scale": 2}, replace=True)
    assert load_preset(tmp_path, "x").request_fields == {"guidance_scale": 2.0}


def test_the_documentation_names_every_key_a_preset_may_hold():
    text = (SHIPPED.parent / "docs" / "prompts.md").read_text(encoding="utf-8")
    assert [key for key in ALLOWED_KEYS if f"`{key}`" not in text] == []
