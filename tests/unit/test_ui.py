"""The page without a browser: what stands where, and what its handlers do with the values of its widgets."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import pytest
import pytest_asyncio
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modules.choices import FIXED_BY_PERFORMANCE, Performance, Source
from modules.errors import ModelFileMissing
from modules.extensions import Extension, Services
from modules.params import PAGE_GROUPS
from modules.request import GenerationRequest
from modules.settings import Settings
from modules.ui import markup
from modules.ui.bindings import Bindings
from modules.ui.controls import Controls, declared_fields
from modules.ui.endpoint import LEFT_OUT, make_endpoint
from modules.ui.layout import PANELS_TO_COME
from modules.ui.page import build_page, make_parts
from modules.ui.run_view import RunView
from modules.ui.runs import Runs
from tests.fakes import FakeEngine
from tests.rest.conftest import make_services

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Built:
    """A page that was built but is not served."""

    services: Services
    engine: FakeEngine
    blocks: gr.Blocks
    controls: Controls
    bindings: Bindings

    @property
    def components(self) -> list[gr.components.Component]:
        return [one for one in self.blocks.blocks.values() if isinstance(one, gr.components.Component)]


class Tabbed(Extension):
    """An extension with a tab."""

    name = "Weather"

    def add_tab(self, services: Services) -> None:
        gr.Markdown("It rains.", elem_id="weather")


def load(tmp_path: Path, *flags: str, **env: str) -> Settings:
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    settings = Settings.load(["--port", "0", "--temp-path", str(tmp_path / "temp"), *flags], env=env, root=tmp_path)
    settings.prepare()
    return settings


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def built_once(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Built]:
    """A page over a fake engine whose queue runs."""
    services, engine, _check, history = make_services(load(tmp_path_factory.mktemp("page")))
    parts = make_parts(services, [Tabbed()])
    await services.jobs.start()
    yield Built(services, engine, parts.blocks, parts.controls, parts.bindings)
    await services.jobs.close()
    history.close()


@pytest.fixture
def built(built_once: Built) -> Built:
    """The page, as if nothing had been done on it; building one takes a second."""
    built_once.engine.runs.clear()
    built_once.engine.release()
    built_once.services.state.api_enabled = True
    return built_once


# -- what stands where ----------------------------------------------------------------------------------------------


async def test_every_parameter_with_a_place_is_on_the_page_once(built: Built) -> None:
    placed = {name for name, one in declared_fields().items() if one.ui.place not in PANELS_TO_COME}
    assert set(built.controls.made) == placed
    widgets = [widget for control in built.controls.made.values() for widget in control.widgets]
    on_page = {id(one) for one in built.components}
    assert len(widgets) == len({id(widget) for widget in widgets})
    assert all(id(widget) in on_page for widget in widgets)


async def test_widgets_show_title_range_and_default_of_the_declaration(built: Built) -> None:
    sharpness = built.controls.widget("sharpness")
    assert (sharpness.label, sharpness.minimum, sharpness.maximum) == ("Image Sharpness", 0, 30)
    assert (sharpness.value, sharpness.step) == (2.0, 0.001)
    assert built.controls.widget("image_number").value == 2  # the page's own default, not the API's
    assert built.controls.widget("save_metadata_to_images").value is False
    assert built.controls.widget("adm_scaler_positive").minimum == 0.1


async def test_element_ids_that_scripts_know_are_there(built: Built) -> None:
    ids = {getattr(one, "elem_id", None) for one in built.blocks.blocks.values()}
    assert ids >= {
        "positive_prompt", "negative_prompt", "generate_button", "skip_button", "stop_button", "reset_button",
        "load_parameter_button", "final_gallery", "progress-bar", "aspect_ratios_accordion",
    }  # fmt: skip


async def test_what_does_not_work_yet_cannot_be_changed_and_is_not_sent(built: Built) -> None:
    early = [control for control in built.controls.made.values() if not control.declared.ui.works]
    assert early
    assert all(widget.interactive is False for control in early for widget in control.widgets)
    assert not built.controls.inputs & {widget for control in early for widget in control.widgets}


async def test_only_generate_is_open_to_clients(built: Built) -> None:
    open_events = [one.api_name for one in built.blocks.fns.values() if one.api_visibility == "public"]
    assert open_events == ["generate"]


async def test_an_extension_gets_a_tab_of_its_name(built: Built) -> None:
    assert "Weather" in [one.label for one in built.blocks.blocks.values() if isinstance(one, gr.Tab)]
    assert any(getattr(one, "elem_id", None) == "weather" for one in built.components)


# -- values in and out ----------------------------------------------------------------------------------------------


def values_of(built: Built, **changed: object) -> dict[object, object]:
    """Widget → value as the page starts, with some fields changed."""
    values = {widget: widget.value for control in built.controls.working for widget in control.widgets}
    for widget, update in built.controls.updates(changed).items():
        values[widget] = update["value"]
    return values


async def test_untouched_page_asks_for_the_configured_defaults(built: Built) -> None:
    asked = GenerationRequest.model_validate(built.controls.read(values_of(built)))
    configured = GenerationRequest.model_validate(built.services.settings.page_defaults())
    assert {name: getattr(asked, name) for name in asked.model_fields_set} == {
        name: getattr(configured, name) for name in asked.model_fields_set
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"image_seed": 2**63 - 1},
        {"image_seed": -1},
        {"aspect_ratios_selection": "640*480"},
        {"style_selections": ("SAI Anime", "Fooocus V2")},
        {"loras": ({"enabled": True, "model_name": "sub/x.safetensors", "weight": -1.25},)},
        {"performance_selection": "Lightning", "sampler_name": "lcm", "scheduler_name": "turbo"},
        {"prompt": "ein Wald\n森", "negative_prompt": "fog", "image_number": 7, "output_format": "webp"},
        {"refiner_model_name": "gone.safetensors", "vae_name": "v.safetensors", "freeu_enabled": True, "freeu_s2": 3.5},
    ],
)
async def test_shown_values_are_read_back_as_they_were(built: Built, fields: dict[str, object]) -> None:
    read = GenerationRequest.model_validate(built.controls.read(values_of(built, **fields)))
    wanted = GenerationRequest.model_validate(fields)
    for name in fields:
        got = getattr(read, name)
        assert (got[: len(wanted.loras)] if name == "loras" else got) == getattr(wanted, name)


async def test_jpg_is_shown_as_jpeg(built: Built) -> None:
    assert built.controls.made["output_format"].show("jpg") == [{"value": "jpeg"}]


async def test_distilled_performance_locks_exactly_what_it_forces(built: Built) -> None:
    *locks, negative, intermediate = built.bindings.lock_forced("Lightning")
    forced = list(FIXED_BY_PERFORMANCE[Performance.LIGHTNING].forced)
    assert [update["interactive"] for update in locks] == [False] * len(forced)
    assert (negative["visible"], intermediate["value"]) == (False, True)
    *locks, negative, intermediate = built.bindings.lock_forced("Speed")
    assert all(update["interactive"] for update in locks)
    assert (negative["visible"], intermediate["value"]) == (True, False)


async def test_preset_sets_its_values_keeps_the_prompt_and_switches_missing_loras_off(built: Built) -> None:
    updates = await anext(built.bindings.apply_preset("realistic"))
    controls = built.controls
    assert updates[controls.widget("guidance_scale")]["value"] == 3
    assert controls.widget("prompt") not in updates
    enabled, name, weight = controls.made["loras"].widgets[:3]
    assert updates[name]["value"] == "SDXL_FILM_PHOTOGRAPHY_STYLE_V1.safetensors"
    assert (updates[enabled]["value"], updates[weight]["value"]) == (False, 0.25)
    assert "SDXL_FILM_PHOTOGRAPHY_STYLE_V1.safetensors is not in models/loras" in str(updates.values())
    assert "downloads are switched off (--offline)" in str(updates.values())


async def test_unreadable_preset_is_a_sentence(built: Built) -> None:
    (updates,) = (await anext(built.bindings.apply_preset("realistc"))).values()
    assert "Did you mean &#x27;realistic&#x27;" in updates["value"]


async def test_style_search_puts_matches_before_chosen_before_others(built: Built) -> None:
    choices = built.bindings.sort_styles("anime", ["Fooocus V2"])["choices"]
    assert choices[:3] == ["SAI Anime", "MRE Anime", "Fooocus V2"]
    assert sorted(choices) == sorted(built.services.styles.names)


async def test_pasted_parameters_set_the_page(built: Built) -> None:
    updates = await built.bindings.load_parameters('{"prompt": "a fox", "seed": "5", "steps": 30}')
    assert updates[built.controls.widget("prompt")]["value"] == "a fox"
    random, seed = built.controls.made["image_seed"].widgets
    assert (updates[random]["value"], updates[seed]["value"]) == (False, "5")


def picture_with(path: Path, **parameters: object) -> str:
    """A PNG file that carries parameters as Fooocus writes them."""
    chunks = PngInfo()
    chunks.add_text("parameters", json.dumps(parameters))
    chunks.add_text("fooocus_scheme", "fooocus")
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return str(path)


async def test_parameters_of_a_picture_are_shown_and_set_the_page(built: Built, tmp_path: Path) -> None:
    path = picture_with(tmp_path / "a.png", prompt="märchenhaft 森", seed="11", guidance_scale=6.5)
    shown, apply, message = await built.bindings.read_picture(path)
    assert shown["value"]["metadata_scheme"] == "fooocus"
    assert shown["value"]["parameters"]["prompt"] == "märchenhaft 森"
    assert (shown["visible"], apply["visible"], message["value"]) == (True, True, "")
    updates = await built.bindings.apply_picture(path)
    assert updates[built.controls.widget("prompt")]["value"] == "märchenhaft 森"
    assert updates[built.controls.widget("guidance_scale")]["value"] == 6.5


async def test_picture_without_parameters_and_no_picture_say_so(built: Built, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "none.png").write_bytes(b"no picture")
    for name, sentence in (("plain.png", "carries no generation parameters"), ("none.png", "not a PNG, JPEG or WebP")):
        shown, apply, message = await built.bindings.read_picture(str(tmp_path / name))
        assert (shown["visible"], apply["visible"]) == (False, False)
        assert sentence in message["value"]


async def test_api_switch_is_remembered(built: Built) -> None:
    built.bindings.switch_api(False)
    assert built.services.state.api_enabled is False
    assert built.bindings.api_state() is False


# -- runs -----------------------------------------------------------------------------------------------------------


async def test_generate_goes_through_the_door_with_the_values_of_the_page(built: Built) -> None:
    updates = [one async for one in built.bindings.generate(values_of(built, prompt="a fox", image_seed=9))]
    (record,) = built.engine.runs
    assert (record.source, record.req_params["prompt"], record.req_params["image_seed"]) == (Source.WEBUI, "a fox", 9)
    gallery = next(one for one in built.components if getattr(one, "elem_id", "") == "final_gallery")
    shown = [one[gallery] for one in updates if gallery in one]
    assert [Path(path).is_file() for path in shown[-1]["value"]] == [True, True]
    assert shown[-1]["visible"] is True


async def test_updates_hold_only_what_changed(built: Built) -> None:
    updates = [one async for one in built.bindings.generate(values_of(built, prompt="a fox"))]
    generate = next(one for one in built.components if getattr(one, "elem_id", "") == "generate_button")
    assert [one[generate]["visible"] for one in updates if generate in one] == [False, True]


async def test_refused_value_names_its_widget_and_queues_nothing(built: Built) -> None:
    views = [view async for view in Runs(built.services).generate({"guidance_scale": 99})]
    assert [view.problem for view in views] == ["Guidance Scale: Input should be less than or equal to 30."]
    assert built.engine.runs == []


async def test_attaching_to_an_unknown_task_shows_the_empty_page(built: Built) -> None:
    assert [view async for view in Runs(built.services).attach("0" * 32)] == [RunView()]


async def test_stop_ends_the_named_task_only(built: Built) -> None:
    runs = Runs(built.services)
    built.engine.hold(2)
    first = await built.services.handlers.submit(GenerationRequest(prompt="1"), source=Source.WEBUI)
    second = await built.services.handlers.submit(GenerationRequest(prompt="2"), source=Source.WEBUI)
    await built.engine.held.wait()
    assert await runs.stop(second.task_id)
    assert (first.record.task_status, second.record.task_status) == ("running", "stop")
    built.engine.release()
    assert (await built.services.handlers.finished_record(first)).task_status == "finished"
    assert not await runs.stop(first.task_id)
    assert not await runs.stop("")


async def test_waiting_view_follows_the_queue(built: Built) -> None:
    runs = Runs(built.services)
    built.engine.hold(1)
    jobs = [
        await built.services.handlers.submit(GenerationRequest(prompt=str(n)), source=Source.WEBUI) for n in range(3)
    ]
    await built.engine.held.wait()
    texts: list[str] = []
    async for view in runs.follow(jobs[2]):
        texts.append(view.text)
        if "2 tasks are ahead" in view.text:
            await runs.stop(jobs[1].task_id)
        if "1 task is ahead" in view.text:
            built.engine.release()
    assert texts[0].endswith("2 tasks are ahead")
    assert any(text.endswith("1 task is ahead") for text in texts)
    assert view.phase == "ended"


# -- describe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (90, 120), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


async def described(built: Built, *values: object) -> list[dict[str, object]]:
    """What each step of describing changes, by the element's id."""
    steps = [step async for step in built.bindings.describe(*values)]
    return [{widget.elem_id: update["value"] for widget, update in step.items()} for step in steps]


async def test_described_picture_gives_prompt_and_styles(built: Built, picture: str) -> None:
    built.engine.answers["describe"] = "a red field"
    first, last = await described(built, picture, ["Photograph", "Art/Anime"], True)
    assert first == {"describe_button": "Describing ...", "messages": ""}
    assert last == {
        "describe_button": "Describe this Image into Prompt",
        "positive_prompt": "a red field",
        "style_selections": ["Fooocus V2", "Fooocus Enhance", "Fooocus Sharp", "Fooocus Masterpiece"],
    }
    assert built.engine.calls[-1] == ("describe", {"image_path": picture, "kinds": ["Photo", "Anime"]})


async def test_styles_stay_where_they_are_not_wanted(built: Built, picture: str) -> None:
    built.engine.answers["describe"] = "one, two"
    *_, last = await described(built, picture, ["Art/Anime"], False)
    assert set(last) == {"describe_button", "positive_prompt"}


@pytest.mark.parametrize(("has_picture", "content", "way_out"), [(False, ["Photograph"], "Put"), (True, [], "Choose")])
async def test_nothing_to_describe_says_what_to_do(
    built: Built, picture: str, has_picture: bool, content: list[str], way_out: str
) -> None:
    calls = list(built.engine.calls)
    [step] = await described(built, picture if has_picture else None, content, True)
    assert f"There is nothing to describe. {way_out}" in str(step["messages"])
    assert built.engine.calls == calls


async def test_failed_description_is_told_and_can_be_tried_again(built: Built, picture: str) -> None:
    built.engine.answers["describe"] = ModelFileMissing("The network is gone.")
    *_, last = await described(built, picture, ["Photograph"], True)
    assert "The network is gone." in str(last["messages"])
    assert last["describe_button"] == "Describe this Image into Prompt"


async def test_picture_to_describe_tells_its_size(built: Built, picture: str, tmp_path: Path) -> None:
    shown = (await built.bindings.size_of_picture(picture))["value"]
    assert "90 × 120, 0.75, 3:4" in shown
    assert "896×1152 ∣ 7:9" in shown
    assert (await built.bindings.size_of_picture(None))["value"] == ""
    (tmp_path / "no.png").write_text("no picture")
    assert "not a picture" in (await built.bindings.size_of_picture(str(tmp_path / "no.png")))["value"]


# -- the named endpoint ---------------------------------------------------------------------------------------------


async def test_endpoint_takes_every_parameter_of_a_request_by_name(built: Built) -> None:
    import inspect

    names = set(inspect.signature(make_endpoint(built.services, lambda: None)).parameters)
    assert names == set(GenerationRequest.model_fields) - LEFT_OUT
    assert {name for group in PAGE_GROUPS for name in group.model_fields} - LEFT_OUT <= names


async def test_endpoint_gives_record_and_files(built: Built) -> None:
    endpoint = make_endpoint(built.services, lambda: None)
    *_progress, (record, files) = [
        answer async for answer in endpoint("a fox", image_number=2, image_seed=4, preset="anime")
    ]
    assert (record["task_status"], record["seeds"]) == ("finished", [4, 5])
    assert record["req_params"]["guidance_scale"] == 6
    assert [Path(file["path"]).is_file() for file in files] == [True, True]


async def test_endpoint_refuses_in_words(built: Built) -> None:
    endpoint = make_endpoint(built.services, lambda: None)
    with pytest.raises(gr.Error, match="Image Number: Input should be less than or equal to 32"):
        await anext(endpoint(image_number=99))


async def test_endpoint_is_shut_while_the_api_is(built: Built) -> None:
    built.services.state.api_enabled = False
    with pytest.raises(gr.Error, match="switched off"):
        await anext(make_endpoint(built.services, lambda: None)(prompt="a fox"))


# -- the whole ------------------------------------------------------------------------------------------------------


async def test_page_reads_pictures_but_nothing_else_of_the_output_folder(tmp_path: Path) -> None:
    import httpx

    services, _engine, _check, history = make_services(load(tmp_path))
    outputs = services.settings.paths.outputs
    (outputs / "2026-01-01").mkdir()
    (outputs / "2026-01-01" / "a.png").write_bytes(b"png")
    page = build_page(services, [])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(page.app), base_url="http://127.0.0.1") as client:
        picture = await client.get("/" + markup.file_url(outputs / "2026-01-01" / "a.png"))
        secret = await client.get("/" + markup.file_url(outputs / "settings_state.json"))
    history.close()
    assert (outputs / "settings_state.json").is_file()
    assert (picture.status_code, secret.status_code) == (200, 403)
