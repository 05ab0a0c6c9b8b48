"""Page and API together behind one key: a walk over every route of both."""

import asyncio
import re
from collections.abc import Iterator

import httpx
import pytest

from modules.extensions import Services
from modules.serving import Page
from tests.rest.live import live_server

KEY = {"X-API-KEY": "sesame"}


def the_page(services: Services) -> Page:
    from modules.ui.page import build_page

    return build_page(services, [])


def gradio_paths(page: Page) -> Iterator[tuple[str, str]]:
    """(method, path) of every route of the page's app and of Gradio's below it."""
    routes = list(page.app.routes)
    while routes:
        route = routes.pop()
        for child in (route, getattr(route, "app", None), getattr(route, "original_router", None)):
            routes += [one for one in getattr(child, "routes", None) or [] if one is not route]
        for method in getattr(route, "methods", None) or ():
            yield method, re.sub(r"\{.*?\}", "x", route.path)


@pytest.mark.slow
async def test_with_a_key_nothing_but_login_health_and_signed_files_is_open(tmp_path):
    pages: list[Page] = []

    def make(services: Services) -> Page:
        pages.append(the_page(services))
        return pages[0]

    async with live_server(tmp_path, "--apikey", "sesame", page=make) as live, httpx.AsyncClient() as client:
        schema = (await client.get(live.api_url + "/openapi.json", headers=KEY)).json()
        ours = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
        walk = ours | set(gradio_paths(pages[0])) | {("GET", path) for path in ("/", "/docs", "/config", "/-/x")}
        assert len(walk) > 90
        open_routes = set()
        for method, path in sorted(walk):
            for base in (live.page_url, live.api_url):
                reply = await client.request(method, base + re.sub(r"[{}]", "", path))
                if reply.status_code != 403:
                    open_routes.add(path)
        assert open_routes == {"/healthz", "/readyz"}
        assert (await client.get(live.page_url + "/-/login")).status_code == 200
        assert (await client.get(live.page_url + "/config", headers=KEY)).status_code == 200
        there = await client.get(live.page_url + "/", headers={"accept": "text/html"})
        assert (there.status_code, there.headers["location"]) == (303, "/-/login?next=/")


@pytest.mark.slow
async def test_the_page_is_whole_beside_the_api(tmp_path):
    async with live_server(tmp_path, page=the_page) as live, httpx.AsyncClient() as client:
        assert "gradio" in (await client.get(live.page_url + "/")).text
        assert (await client.get(live.page_url + "/config")).json()["components"]
        assert (await client.get(live.page_url + "/gradio_api/info")).status_code == 200
        assert (await client.get(live.page_url + "/ping")).text == "pong"
        evil = await client.post(live.page_url + "/gradio_api/queue/join", headers={"origin": "https://evil.example"})
        assert evil.status_code == 403


@pytest.mark.slow
async def test_with_persons_nothing_of_the_page_is_open_and_gradios_own_client_can_log_in(tmp_path):
    from gradio_client import Client

    pages: list[Page] = []

    def make(services: Services) -> Page:
        pages.append(the_page(services))
        return pages[0]

    async with live_server(tmp_path, "--auth", "ann:apple", page=make) as live, httpx.AsyncClient() as client:
        owned = live.server._application.asgi._owners
        walk = {(method, path) for method, path in gradio_paths(pages[0]) if path.split("/")[1] not in owned}
        assert len(walk) > 60
        for method, path in sorted(walk):
            assert (await client.request(method, live.page_url + path)).status_code == 403, path

        def log_in() -> dict:
            known = Client(live.page_url, auth=("ann", "apple"), verbose=False)
            return known.view_api(return_format="dict", print_info=False)

        assert (await asyncio.to_thread(log_in))["named_endpoints"]
        await client.post(live.page_url + "/login", data={"username": "ann", "password": "apple"})
        assert "--auth guards the page alone" in (await client.get(live.page_url + "/config")).text
