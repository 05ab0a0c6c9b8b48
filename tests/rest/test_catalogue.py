"""Lists of models, styles and the like, and the two tools."""

import base64
import io

import pytest
from PIL import Image

from modules.errors import ModelFileMissing
from modules.loads import ModelLoad, tell
from tests.fakes import png_base64
from tests.rest.conftest import Running, running_server

PNG = base64.b64decode(png_base64())


async def test_all_models_rescans_the_folders_at_each_call(server: Running):
    folder = server.services.settings.paths.checkpoints[0]
    assert (await server.client.get("/v1/engines/all-models")).json()["model_filenames"] == []
    (folder / "sub").mkdir()
    for name in ("b.safetensors", "A.ckpt", "sub/c.safetensors", "notes.txt"):
        (folder / name).write_bytes(b"")
    (server.services.settings.paths.loras[0] / "l.safetensors").write_bytes(b"")
    assert (await server.client.get("/v1/engines/all-models/")).json() == {
        "model_filenames": ["A.ckpt", "b.safetensors", "sub/c.safetensors"],
        "lora_filenames": ["l.safetensors"],
    }


async def test_styles_are_279_names_in_order(server: Running):
    names = (await server.client.get("/v1/engines/styles")).json()
    assert len(names) == 279
    assert names[:2] == ["Fooocus V2", "Random Style"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("presets", "default"), ("samplers", "dpmpp_2m_sde_gpu"), ("schedulers", "karras"), ("vaes", "Default (model)")],
)
async def test_other_lists(server: Running, path, name):
    for slash in ("", "/"):
        assert name in (await server.client.get(f"/v1/engines/{path}{slash}")).json()


async def test_ping(server: Running):
    assert (await server.client.get("/ping")).text == "pong"


# -- 11.1 describe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind"),
    [("Photo", "Photo"), ("Photograph", "Photo"), ("Anime", "Anime"), ("Art/Anime", "Anime"), (None, "Photo")],
)
async def test_describe_knows_the_words_of_the_page_too(server: Running, word, kind):
    server.engine.answers["describe"] = "a dog"
    body = {"image": png_base64(), **({"image_type": word} if word else {})}
    assert (await server.client.post("/v1/tools/describe-image", json=body)).json() == {"describe": "a dog"}
    assert server.engine.calls[-1][1]["kinds"] == [kind]


async def test_describe_takes_the_type_from_the_form_or_the_query(server: Running):
    server.engine.answers["describe"] = "a dog"
    for options in ({"data": {"image_type": "Anime"}}, {"params": {"image_type": "Anime"}}):
        await server.client.post("/v1/tools/describe-image/", files={"image": ("x.png", PNG)}, **options)
        assert server.engine.calls[-1][1]["kinds"] == ["Anime"]


@pytest.mark.parametrize(
    "options",
    [
        {"json": {}},
        {"json": {"image": ""}},
        {"json": {"image": "%%%"}},
        {"json": {"image": png_base64(), "image_type": "Painting"}},
        {"files": {"other": ("x.png", PNG)}},
        {"files": {"image": ("x.png", b"no picture")}},
        {"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    ],
)
async def test_describe_without_a_usable_picture_is_422(server: Running, options):
    reply = await server.client.post("/v1/tools/describe-image", **options)
    assert reply.status_code == 422, reply.text
    assert reply.json()["detail"][0]["loc"][0] == "body"
    assert server.engine.calls == []


async def test_a_tool_whose_model_is_missing_says_which(server: Running):
    server.engine.answers["describe"] = ModelFileMissing(
        "'blip.safetensors' is not in models/; download it from the page."
    )
    reply = await server.client.post("/v1/tools/describe-image", json={"image": png_base64()})
    assert (reply.status_code, "blip.safetensors" in reply.text) == (422, True)


# -- 11.2 mask ------------------------------------------------------------------------------------------------------


async def test_generate_mask_answers_with_bare_base64_png(server: Running, tmp_path):
    Image.new("L", (32, 24), 255).save(tmp_path / "mask.png")
    server.engine.answers["generate_mask"] = str(tmp_path / "mask.png")
    reply = await server.client.post("/v1/tools/generate_mask", json={"image": png_base64(), "mask_model": "u2netp"})
    mask = Image.open(io.BytesIO(base64.b64decode(reply.json())))
    assert (mask.format, mask.size) == ("PNG", (32, 24))
    options = server.engine.calls[-1][1]
    assert (options["mask_model"], options["box_threshold"], options["text_threshold"]) == ("u2netp", 0.3, 0.25)


@pytest.mark.parametrize(
    "body", [{}, {"image": png_base64(), "mask_model": "x"}, {"image": png_base64(), "box_threshold": 2}]
)
async def test_generate_mask_refuses_what_does_not_fit(server: Running, body):
    assert (await server.client.post("/v1/tools/generate_mask", json=body)).status_code == 422


# -- operation ------------------------------------------------------------------------------------------------------


async def test_metrics_count_tasks_pictures_and_routes(server: Running):
    await server.generate({"image_number": 2})
    await server.client.get("/tasks/unknown-id")
    text = (await server.client.get("/metrics")).text
    assert 'focale_tasks_total{source="api",status="finished"} 1.0' in text
    assert "focale_images_total 2.0" in text
    assert 'route="/tasks/{task_id}",status="404"} 1.0' in text
    assert "unknown-id" not in text
    steps = [line for line in text.splitlines() if line.startswith("focale_step_seconds_count")]
    assert steps == ["focale_step_seconds_count 6.0"]
    assert "process_resident_memory_bytes" in text
    assert "focale_worker_resident_bytes" in text


async def test_metrics_count_loads_of_models_by_kind(server: Running):
    tell(ModelLoad("checkpoint", "a.safetensors", 2.5))
    tell(ModelLoad("checkpoint", "b.safetensors", 0.5))
    tell(ModelLoad("lora", "c.safetensors", 0.25))
    text = (await server.client.get("/metrics")).text
    assert 'focale_model_loads_total{kind="checkpoint"} 2.0' in text
    assert 'focale_model_loads_total{kind="lora"} 1.0' in text
    assert 'focale_model_load_seconds_sum{kind="checkpoint"} 3.0' in text
    assert "safetensors" not in text


async def test_a_server_that_ended_hears_of_no_more_loads(tmp_path):
    async with running_server(tmp_path) as server:
        metrics = server.rest._api.metrics
    tell(ModelLoad("checkpoint", "a.safetensors", 2.5))
    assert b'kind="checkpoint"' not in metrics.render()[0]


async def test_health_and_readiness(server: Running):
    assert (await server.client.get("/healthz")).json() == {"status": "ok"}
    assert (await server.client.get("/readyz")).status_code == 200
    server.services.jobs.pause()
    assert (await server.client.get("/readyz")).status_code == 503
