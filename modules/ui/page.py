"""Builds the page: widgets, events, theme and script on a Gradio app of its own."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from gradio.routes import App

from modules.extensions import Extension, Services
from modules.files import Kind
from modules.plan import EMBEDDED_MODEL
from modules.presets import INITIAL, preset_names
from modules.serving import Page
from modules.ui import layout, markup, theme
from modules.ui.bindings import Bindings
from modules.ui.controls import Controls, Offer
from modules.ui.endpoint import add_endpoint
from modules.ui.run_view import RunView
from modules.version import VERSION

CACHE_S = 3600
ONLY_DEMO = (
    "There is no model yet, so the built-in demo model draws small test pictures. For real ones put an SDXL checkpoint "
    "into models/checkpoints, or let this page download one: see below."
)
ONLY_DEMO_OFFLINE = (
    "There is no model yet, so the built-in demo model draws small test pictures. Put an SDXL checkpoint into "
    "models/checkpoints for real ones."
)


def build_page(services: Services, extensions: Sequence[Extension]) -> Page:
    """The page as the server mounts it."""
    blocks = make_parts(services, extensions).blocks
    web = App(openapi_url=None)
    settings = services.settings
    gr.mount_gradio_app(
        web,
        blocks,
        path="/",
        footer_links=["api", "settings"],
        run_history=False,
        theme=theme.make_theme(),
        head=theme.head(settings.theme),
        ssr_mode=False,
        mcp_server=False,
        max_file_size=f"{settings.web_upload_size}mb",
        favicon_path=str(theme.STATIC / "favicon.svg"),
        pwa=False,
    )
    mounted: App = web.routes[-1].app  # type: ignore[attr-defined]

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with web.router.lifespan_context(web):
            yield

    return Page(app=web, lifespan=lifespan, end_streams=mounted.stop_event.set)


@dataclass(frozen=True)
class Parts:
    """A page that is built: the whole, the widgets of parameters, and what its events do."""

    blocks: gr.Blocks
    controls: Controls
    bindings: Bindings


def make_parts(services: Services, extensions: Sequence[Extension]) -> Parts:
    """All widgets and events of the page."""
    settings = services.settings
    config = settings.config
    controls = Controls(lambda: offer(services), settings.page_defaults())
    share = ResultFolders(settings.paths.outputs)
    share()
    blocks = gr.Blocks(title=f"Focale {VERSION}", fill_width=True, delete_cache=(CACHE_S, CACHE_S))
    with blocks:
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=320, elem_id="left_column"):
                stage = markup.stage(RunView(), settings.paths.outputs, demo_hint(services))
                viewer = layout.viewer(controls, stage=stage, warning=services.settings.exposure)
                missing = layout.missing_files()
                boxes = layout.switches(config)
                inputs, describe, metadata = layout.input_panel(config)
                enhance = layout.enhance_panel(is_open=config.default_enhance_checkbox)
            with gr.Column(
                scale=1, min_width=320, visible=config.default_advanced_checkbox, elem_id="right_column"
            ) as right:
                extras = layout.settings_tab(
                    controls,
                    presets=[] if settings.disable_preset_selection else preset_names(settings.paths.presets),
                    preset=settings.preset or INITIAL,
                    link=markup.history_link(settings.paths.outputs, RunView()),
                    api_enabled=services.state.api_enabled,
                    extensions=[(one.name, partial(one.add_tab, services)) for one in extensions if has_tab(one)],
                )
        switches = layout.Switches(
            input_image=boxes[0], enhance=boxes[1], advanced=boxes[2],
            input_panel=inputs, enhance_panel=enhance, advanced_panel=right,
        )  # fmt: skip
        add_endpoint(services, share)
        bindings = Bindings(
            services, controls=controls, viewer=viewer, missing=missing, switches=switches, extras=extras,
            describe=describe, metadata=metadata, share_results=share, hint=lambda: demo_hint(services),
        )  # fmt: skip
        bindings.connect(blocks)
    return Parts(blocks, controls, bindings)


def has_tab(extension: Extension) -> bool:
    """True for extensions that put something on the page."""
    return type(extension).add_tab is not Extension.add_tab


def offer(services: Services) -> Offer:
    """What can be chosen now."""
    config, files = services.settings.config, services.files
    return Offer(
        checkpoints=files.names(Kind.CHECKPOINT),
        loras=files.names(Kind.LORA),
        vaes=files.names(Kind.VAE),
        styles=services.styles.names,
        ratios=config.available_aspect_ratios,
        max_images=config.default_max_image_number,
        lora_rows=config.default_max_lora_number,
        lora_weights=(config.default_loras_min_weight, config.default_loras_max_weight),
    )


def demo_hint(services: Services) -> str:
    """How to get a real model, while there is none."""
    if services.files.names(Kind.CHECKPOINT) not in ([], [EMBEDDED_MODEL]):
        return ""
    return ONLY_DEMO_OFFLINE if services.provision.switched_off_by else ONLY_DEMO


class ResultFolders:
    """Lets the page's browser read the day folders of the output folder, and nothing else in it."""

    def __init__(self, root: Path) -> None:
        """Watch `root`, the output folder."""
        self._root = root
        self._shared: set[Path] = set()

    def __call__(self) -> None:
        """Share the day folders that are new."""
        new = set(markup.day_folders(self._root)) - self._shared
        if new:
            gr.set_static_paths(sorted(new))
            self._shared |= new
