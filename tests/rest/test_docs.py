"""The schema and the documentation page: true, complete, and readable without a network."""

import re

import pytest

from modules.request import GenerationRequest
from tests.rest.conftest import Running, Serve

REST_PATHS = {
    "/v1/engine/generate/", "/v1/engine/control/", "/v1/tools/describe-image", "/v1/tools/generate_mask", "/tasks",
    "/tasks/{task_id}", "/tasks/{task_id}/cancel", "/tasks/{task_id}/events", "/v1/engines/all-models",
    "/v1/engines/styles", "/v1/engines/presets", "/v1/engines/samplers", "/v1/engines/schedulers", "/v1/engines/vaes",
    "/outputs/{date}/{file}", "/inputs/{file}", "/ping", "/healthz", "/readyz", "/metrics",
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
