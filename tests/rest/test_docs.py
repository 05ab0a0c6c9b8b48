"""The schema and the documentation page: true, complete, and readable without a network."""

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from modules.extensions import Extension, load_extensions
from modules.request import GenerationRequest
from tests.rest.conftest import ROOT, Running, Serve
from tests.rest.live import Live, live_server

REST_PATHS = {
    "/v1/engine/generate/", "/v1/engine/control/", "/v1/engine/queue/", "/v1/tools/describe-image",
    "/v1/tools/generate_mask", "/tasks", "/tasks/{task_id}", "/tasks/{task_id}/cancel", "/tasks/{task_id}/events",
    "/v1/engines/all-models", "/v1/engines/styles", "/v1/engines/presets", "/v1/engines/samplers",
    "/v1/engines/schedulers", "/v1/engines/vaes", "/outputs/{date}/{file}", "/inputs/{file}", "/ping", "/healthz",
    "/readyz", "/metrics",
}  # fmt: skip


async def schema_of(server: Running) -> dict:
    reply = await server.client.get("/openapi.json")
    assert reply.status_code == 200
    return reply.json()


async def test_the_schema_lists_our_routes_and_no_others(serve: Serve):
    server = await serve("--no-legacy-api")
    assert set((await schema_of(server))["paths"]) == REST_PATHS


async def test_every_default_of_a_generate_call_is_in_the_schema(server: Running):
    properties = (await schema_of(server))["components"]["schemas"]["CommonRequest"]["properties"]
    defaults = server.rest._api.request_model().model_dump(mode="json")
    assert properties.keys() == GenerationRequest.model_fields.keys()
    for name, value in defaults.items():
        shown = properties[name]["default"]
        if not isinstance(value, list):
            assert shown == value, name
        else:
            assert len(shown) == len(value), name


async def test_every_reference_in_the_schema_leads_somewhere(server: Running):
    schema = await schema_of(server)
    names = set(re.findall(r"#/components/schemas/([\w.-]+)", str(schema)))
    assert names <= schema["components"]["schemas"].keys()


async def test_every_operation_declares_what_the_gate_and_its_checks_can_answer(server: Running):
    for path, operations in (await schema_of(server))["paths"].items():
        for method, operation in operations.items():
            statuses = set(operation["responses"])
            assert {"200", "403", "404", "413", "429"} <= statuses, (method, path)
            assert operation["operationId"]
            if operation.get("parameters") or "requestBody" in operation:
                assert "422" in statuses or path.startswith(("/outputs", "/inputs", "/tasks/", "/files")), (
                    method,
                    path,
                )


async def test_the_example_of_the_schema_works_as_it_stands(server: Running):
    operation = (await schema_of(server))["paths"]["/v1/engine/generate/"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["example"]
    reply = await server.generate(body)
    assert (reply.status_code, "x-ignored-fields" in reply.headers) == (200, False)


async def test_the_page_needs_nothing_from_elsewhere(server: Running):
    page = (await server.client.get("/docs")).text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(links) >= 3
    for link in links:
        assert link.startswith("/docs/"), link
        reply = await server.client.get(link)
        assert reply.status_code == 200
        assert len(reply.content) > 300
    assert "url: '/openapi.json'" in page
    assert "http://" not in page
    assert (await server.client.get("/docs/")).status_code == 200


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt"])
async def test_the_licence_of_the_vendored_page_comes_with_it(server: Running, name):
    assert (await server.client.get(f"/docs/{name}")).status_code == 200


# -- the documents --------------------------------------------------------------------------------------------------


def code_of(page: str, language: str) -> list[str]:
    """Code blocks of a document."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_page_of_the_api_is_fresh():
    done = subprocess.run(
        [sys.executable, "tools/make_api_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    async with live_server(tmp_path / "server") as started:
        yield started


@pytest.mark.parametrize("number", range(6))
async def test_python_programs_of_the_migration_guide_run_as_they_stand(live: Live, tmp_path, number):
    program = code_of("migration.md", "python")[number].replace("http://127.0.0.1:7866", live.api_url)
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert len(live.engine.runs) == 1
    if "apple.webp" in program:
        assert (tmp_path / "apple.webp").read_bytes()[8:12] == b"WEBP"
    else:
        assert f"{live.api_url}/outputs/" in done.stdout


async def test_shell_programs_of_the_migration_guide_run_as_they_stand(live: Live, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert len(code_of("migration.md", "python")) == 6
    programs = code_of("migration.md", "bash")
    for program in programs:
        shell = ["bash", "-e", "-c", program.replace("http://127.0.0.1:7866", live.api_url)]
        done = await asyncio.to_thread(subprocess.run, shell, cwd=tmp_path, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")


async def test_the_extension_of_the_guide_works_as_it_stands(tmp_path, monkeypatch):
    package = tmp_path / "written_by_a_stranger" / "counter"
    package.mkdir(parents=True)
    example, generating = code_of("extensions.md", "python")
    (package / "__init__.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_extensions(package.parent, "written_by_a_stranger")
    assert loaded.problems == ()
    flags = ("--count-from", "5")
    async with live_server(tmp_path / "server", *flags, more=loaded.extensions) as live, httpx.AsyncClient() as client:
        made: dict = {}
        exec(generating, made)
        path = await made["one_apple"](live.services)
        assert (live.services.settings.paths.outputs / path).is_file()
        job = live.services.jobs.get(live.engine.runs[0].task_id)
        async for _event in job.log.follow():
            pass
        assert (await client.get(live.page_url + "/counter")).json() == {"finished": 6}


def test_every_method_of_an_extension_is_in_its_guide():
    text = (ROOT / "docs" / "extensions.md").read_text(encoding="utf-8")
    methods = [name for name, value in vars(Extension).items() if callable(value) and not name.startswith("_")]
    assert len(methods) == 6
    assert [name for name in methods if f"`{name}(" not in text] == []
