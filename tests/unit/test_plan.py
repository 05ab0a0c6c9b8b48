"""Planning: what a mode fixes, which overwrite wins, what stands in for a missing file."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.choices import MAX_SEED, MetadataScheme, Performance, SamplerName, SchedulerName
from modules.errors import InvalidRequest, UnknownName
from modules.files import Catalogue, Kind
from modules.plan import (
    EMBEDDED_MODEL,
    Plan,
    PlanResources,
    make_plan,
    picture_size,
    switch_step,
)
from modules.prompts import PromptSources, lora_stems
from modules.request import GenerationRequest
from modules.styles import StyleTable, StyleTemplate

DEFAULT = "juggernautXL_v8Rundiffusion.safetensors"


class Machine:
    """A machine with some model files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.catalogue = Catalogue(
            {
                Kind.CHECKPOINT: [root / "checkpoints"],
                Kind.LORA: [root / "loras"],
                Kind.VAE: [root / "vae"],
            },
            root / "embedded",
        )
        self.add("embedded", EMBEDDED_MODEL)

    def add(self, folder: str, name: str) -> None:
        path = self.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self.catalogue.refresh()

    def plan(self, native_size_px: int = 1024, **sent: object) -> Plan:
        request = GenerationRequest.model_validate({"image_seed": 1, "style_selections": [], **sent})
        resources = PlanResources(
            catalogue=self.catalogue,
            prompts=PromptSources(
                styles=StyleTable((StyleTemplate("Ink", "{prompt}, ink", "photo"),)),
                lora_files=lora_stems(self.catalogue.names(Kind.LORA)),
            ),
            default_model=DEFAULT,
            previous_default_models=("older.safetensors",),
            default_loras=frozenset({"sd_xl_offset_example-lora_1.0.safetensors"}),
            default_styles=("Ink", "Ink"),
            default_size="1152*896",
        )
        return make_plan(request, resources, native_size_px=native_size_px)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_an_empty_request_runs_on_the_demo_model_and_says_so(machine: Machine) -> None:
    plan = machine.plan(native_size_px=128)
    assert plan.models.checkpoint.name == EMBEDDED_MODEL
    assert any(DEFAULT in notice and "demo model" in notice for notice in plan.notices)
    assert (plan.sampling.width, plan.sampling.height) == (128, 128)


def test_the_default_model_is_used_when_it_is_there(machine: Machine) -> None:
    machine.add("checkpoints", DEFAULT)
    plan = machine.plan(loras=[])
    assert plan.models.checkpoint.name == DEFAULT
    assert plan.notices == ()
    assert (plan.sampling.width, plan.sampling.height) == (1152, 896)


def test_a_predecessor_stands_in_for_the_default(machine: Machine) -> None:
    machine.add("checkpoints", "older.safetensors")
    assert machine.plan().models.checkpoint.name == "older.safetensors"


def test_old_default_names_mean_the_default(machine: Machine) -> None:
    machine.add("checkpoints", DEFAULT)
    plan = machine.plan(base_model_name="juggernautXL_version6Rundiffusion.safetensors")
    assert plan.models.checkpoint.name == DEFAULT


def test_a_model_that_was_named_and_is_missing_is_an_error_with_near_names(machine: Machine) -> None:
    machine.add("checkpoints", "dreamshaper.safetensors")
    with pytest.raises(UnknownName, match=r"dreamshaper\.safetensors") as caught:
        machine.plan(base_model_name="dreamshapr.safetensors")
    assert caught.value.field == ("base_model_name",)


@pytest.mark.parametrize("field", ["refiner_model_name", "vae_name"])
def test_other_missing_models_are_errors_of_their_field(machine: Machine, field: str) -> None:
    with pytest.raises(UnknownName) as caught:
        machine.plan(**{field: "missing.safetensors"})
    assert caught.value.field == (field,)


def test_a_missing_lora_names_its_row(machine: Machine) -> None:
    with pytest.raises(UnknownName) as caught:
        machine.plan(loras=[{"enabled": True, "model_name": "None"}, {"enabled": True, "model_name": "x.safetensors"}])
    assert caught.value.field == ("loras", 1, "model_name")


def test_loras_are_merged_in_order_and_disabled_rows_are_not(machine: Machine) -> None:
    machine.add("loras", "a.safetensors")
    machine.add("loras", "sub/b.safetensors")
    plan = machine.plan(
        prompt="a cat <lora:b:0.8>",
        loras=[
            {"enabled": True, "model_name": "a.safetensors", "weight": 0.3},
            {"enabled": False, "model_name": "gone"},
        ],
    )
    assert [(lora.name, lora.weight) for lora in plan.images[0].loras] == [
        ("a.safetensors", 0.3),
        ("sub/b.safetensors", 0.8),
    ]


def test_a_refiner_equal_to_the_base_is_no_refiner(machine: Machine) -> None:
    assert machine.plan(base_model_name=EMBEDDED_MODEL, refiner_model_name=EMBEDDED_MODEL).models.refiner is None


@pytest.mark.parametrize(
    ("mode", "steps"), [("Quality", 60), ("Speed", 30), ("Extreme Speed", 8), ("Lightning", 4), ("Hyper-SD", 4)]
)
def test_modes_have_their_steps_unless_overwritten(machine: Machine, mode: str, steps: int) -> None:
    assert machine.plan(performance_selection=mode).sampling.steps == steps
    assert machine.plan(performance_selection=mode, overwrite_step=13).sampling.steps == 13


def test_fast_modes_force_their_values(machine: Machine) -> None:
    sampling = machine.plan(
        performance_selection="Extreme Speed",
        guidance_scale=9,
        sharpness=5,
        sampler_name="euler",
        adm_scaler_positive=2,
    ).sampling
    assert (sampling.sampler, sampling.scheduler) == (SamplerName.LCM, SchedulerName.LCM)
    assert (sampling.guidance_scale, sampling.sharpness, sampling.adaptive_guidance_scale) == (1, 0, 1)
    assert (sampling.adm.positive, sampling.adm.negative, sampling.adm.end) == (1, 1, 0)


def test_a_fast_mode_without_its_lora_says_which_file_is_needed(machine: Machine) -> None:
    machine.add("checkpoints", DEFAULT)
    with pytest.raises(InvalidRequest, match=r"sdxl_lightning_4step_lora\.safetensors"):
        machine.plan(performance_selection="Lightning")
    machine.add("loras", "sdxl_lightning_4step_lora.safetensors")
    assert machine.plan(performance_selection="Lightning").images[0].loras[-1].weight == 1.0


def test_sizes_scale_down_for_small_models_only_when_listed_for_large_ones(machine: Machine) -> None:
    def size(text: str, **sent: object) -> tuple[int, int]:
        return picture_size(GenerationRequest.model_validate({"aspect_ratios_selection": text, **sent}), 128)

    assert size("1024*1024") == (128, 128)
    assert size("1728*576") == (224, 80)
    assert size("128*128") == (128, 128)
    assert size("256*256") == (256, 256)
    assert size("1024*1024", overwrite_width=512) == (512, 128)


@pytest.mark.parametrize(
    ("sent", "size"),
    [
        ({}, (128, 128)),
        ({"aspect_ratios_selection": "896*1152"}, (112, 144)),
        ({"aspect_ratios_selection": "144*112"}, (144, 112)),
        ({"overwrite_height": 64}, (144, 64)),
    ],
)
def test_the_demo_model_draws_a_square_where_nobody_chose_a_size(
    machine: Machine, sent: dict[str, object], size: tuple[int, int]
) -> None:
    plan = machine.plan(native_size_px=128, **sent)
    assert (plan.sampling.width, plan.sampling.height) == size
    assert any("default size" in notice for notice in plan.notices) == (not sent)


@pytest.mark.parametrize(
    ("size", "native_px", "factor"),
    [("128*128", 128, 1), ("192*128", 128, 1), ("256*256", 128, 2), ("256*192", 128, 2), ("512*512", 128, 4),
     ("2048*2048", 1024, 1)],
)  # fmt: skip
def test_small_models_form_shapes_at_their_own_size(machine: Machine, size: str, native_px: int, factor: int) -> None:
    width, height = map(int, size.split("*"))
    plan = machine.plan(native_size_px=native_px, overwrite_width=width, overwrite_height=height)
    assert plan.sampling.coarse_factor == factor


def test_another_small_model_keeps_the_default_size(machine: Machine) -> None:
    machine.add("checkpoints", "small.safetensors")
    sampling = machine.plan(native_size_px=128, base_model_name="small.safetensors").sampling
    assert (sampling.width, sampling.height) == (144, 112)


@pytest.mark.parametrize(
    ("sent", "step"),
    [
        ({}, 15),
        ({"refiner_switch": 0.8}, 24),
        ({"overwrite_switch": 0.5}, 15),
        ({"overwrite_switch": 7}, 7),
        ({"overwrite_switch": 0}, 15),
    ],
)
def test_the_switch_is_a_step_or_a_share(sent: dict[str, object], step: int) -> None:
    assert switch_step(GenerationRequest.model_validate(sent), 30) == step


def test_the_switch_rounds_half_to_even() -> None:
    assert switch_step(GenerationRequest(), 25) == 12


def test_seeds_count_up_and_wrap(machine: Machine) -> None:
    plan = machine.plan(image_number=3, image_seed=MAX_SEED - 1)
    assert [image.seed for image in plan.images] == [MAX_SEED - 1, MAX_SEED, 0]
    plan = machine.plan(image_number=3, image_seed=5, disable_seed_increment=True)
    assert [image.seed for image in plan.images] == [5, 5, 5]


def test_metadata_follow_request_and_machine(machine: Machine) -> None:
    assert machine.plan().output.metadata is MetadataScheme.FOOOCUS
    assert machine.plan(save_metadata_to_images=False).output.metadata is None


def test_styles_reach_the_texts(machine: Machine) -> None:
    texts = machine.plan(prompt="a fox", style_selections=["Ink"]).images[0].texts
    assert texts.positive_texts == ("a fox, ink",)
    assert texts.negative_texts == ("photo",)


def test_default_styles_are_left_out_for_the_demo_model_only(machine: Machine) -> None:
    plan = machine.plan(prompt="a fox", style_selections=["Ink", "Ink"])
    assert plan.images[0].texts.positive_texts == ("a fox",)
    assert any("default styles" in notice for notice in plan.notices)
    machine.add("checkpoints", DEFAULT)
    assert (
        machine.plan(prompt="a fox", style_selections=["Ink", "Ink"]).images[0].texts.positive_texts[0] == "a fox, ink"
    )


@settings(max_examples=60)
@given(
    mode=st.sampled_from(Performance),
    sampler=st.sampled_from(SamplerName),
    scheduler=st.sampled_from(SchedulerName),
    number=st.integers(1, 4),
    step=st.integers(-1, 200),
    width=st.integers(64, 2048),
    native=st.sampled_from([128, 512, 1024]),
)
def test_any_valid_request_gives_a_valid_plan(
    tmp_path_factory: pytest.TempPathFactory,
    mode: Performance,
    sampler: SamplerName,
    scheduler: SchedulerName,
    number: int,
    step: int,
    width: int,
    native: int,
) -> None:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    plan = machine.plan(
        native,
        performance_selection=mode,
        sampler_name=sampler,
        scheduler_name=scheduler,
        image_number=number,
        overwrite_step=step,
        aspect_ratios_selection=f"{width}*{width}",
    )
    assert len(plan.images) == number
    assert plan.sampling.steps >= 1
    assert min(plan.sampling.width, plan.sampling.height) >= 64
