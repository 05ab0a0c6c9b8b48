"""Where everything stands on the page: Fooocus' two columns, made with Gradio."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gradio as gr

from modules.choices import ContentType
from modules.config import Config
from modules.ui import markup
from modules.ui.controls import Controls
from modules.ui.labels import aspect_label

STYLES_SEARCH = "🔎 Type here to search styles ..."

# Places whose features are to come, and the sentence that stands there until then.
PANELS_TO_COME: dict[str, str] = {
    "Upscale or Variation": "This version cannot vary or enlarge pictures yet.",
    "Image Prompt": "This version cannot be guided by pictures yet.",
    "Inpaint or Outpaint": "This version cannot repaint or extend pictures yet.",
    "enhance": "This version cannot improve faces, hands and eyes of finished pictures yet.",
}
IMAGE_TABS = (("Upscale or Variation", "uov_tab"), ("Image Prompt", "ip_tab"), ("Inpaint or Outpaint", "inpaint_tab"))
NOT_YET = "These belong to image inputs, which this version cannot use yet."


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """The left column: viewer, progress, prompt row and what a finished run leaves.

    task_id: hidden box with the id of the run this page shows.
    """

    stage: gr.HTML
    gallery: gr.Gallery
    progress: gr.HTML
    messages: gr.HTML
    seeds: gr.HTML
    reuse_seed: gr.Button
    selected: gr.Number
    task_id: gr.Textbox
    generate: gr.Button
    load: gr.Button
    reset: gr.Button
    skip: gr.Button
    stop: gr.Button


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What is said about missing model files, and the box that has them downloaded with the next run."""

    panel: gr.Column
    note: gr.HTML
    download: gr.Checkbox


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The three check boxes below the prompt, and the panels they open."""

    input_image: gr.Checkbox
    enhance: gr.Checkbox
    advanced: gr.Checkbox
    input_panel: gr.Column
    enhance_panel: gr.Column
    advanced_panel: gr.Column


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Reads parameters out of a picture: the file, what was found, and the button that sets the page to it."""

    picture: gr.File
    shown: gr.JSON
    apply: gr.Button


@dataclass(frozen=True, kw_only=True)
class Describe:
    """Finds words for a picture: the picture, its size, what it is, and the button that writes the prompt."""

    picture: gr.Image
    size: gr.HTML
    content: gr.CheckboxGroup
    set_styles: gr.Checkbox
    button: gr.Button


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Widgets of the right column that are no parameters."""

    preset: gr.Dropdown | None
    ratios: gr.Accordion
    history: gr.HTML
    api_enabled: gr.Checkbox
    style_search: gr.Textbox
    refresh: gr.Button
    debug_mode: gr.Checkbox
    debug_panel: gr.Column


def viewer(controls: Controls, *, stage: str, warning: str) -> Viewer:
    """Viewer, progress bar and prompt row.

    Args:
        stage: HTML of the empty viewer.
        warning: a sentence about this server, "" for none.
    """
    if warning:
        gr.HTML(markup.problem(warning), elem_id="server_warning")
    stage_html = gr.HTML(stage, elem_id="stage")
    gallery = gr.Gallery(
        visible=False, elem_id="final_gallery", show_label=False, label="Gallery", columns=2, object_fit="contain",
        interactive=False, preview=True, height="auto", buttons=["download", "fullscreen"],
    )  # fmt: skip
    progress = gr.HTML("", elem_id="progress-bar")
    messages = gr.HTML("", elem_id="messages")
    with gr.Row(elem_id="seed_row"):
        seeds = gr.HTML("", elem_id="seeds")
        reuse = gr.Button("Reuse seed", visible=False, size="sm", elem_id="reuse_seed", scale=0, min_width=110)
    with gr.Row(elem_id="prompt_row"):
        with gr.Column(scale=17, min_width=200):
            controls.put("prompt")
        with gr.Column(scale=3, min_width=110, elem_id="run_buttons"):
            generate = gr.Button("Generate", variant="primary", elem_id="generate_button")
            load = gr.Button("Load Parameters", variant="primary", elem_id="load_parameter_button")
            reset = gr.Button("Reconnect", variant="primary", elem_id="reset_button")
            skip = gr.Button("Skip", visible=False, elem_id="skip_button")
            stop = gr.Button("Stop", visible=False, variant="stop", elem_id="stop_button")
    return Viewer(
        stage=stage_html, gallery=gallery, progress=progress, messages=messages, seeds=seeds, reuse_seed=reuse,
        selected=gr.Number(0, visible="hidden", elem_id="selected_picture"),
        task_id=gr.Textbox("", visible="hidden", elem_id="task_id"),
        generate=generate, load=load, reset=reset, skip=skip, stop=stop,
    )  # fmt: skip


def missing_files() -> Missing:
    """The panel about missing model files, hidden until there are some."""
    with gr.Column(visible=False, elem_id="missing_files") as panel:
        note = gr.HTML("", elem_id="missing_note")
        download = gr.Checkbox(False, label="Download", elem_id="download_missing", container=False)
    return Missing(panel=panel, note=note, download=download)


def switches(config: Config) -> tuple[gr.Checkbox, gr.Checkbox, gr.Checkbox]:
    """Input Image, Enhance, Advanced."""
    with gr.Row(elem_id="switches"):
        return (
            gr.Checkbox(config.default_image_prompt_checkbox, label="Input Image", container=False, min_width=90),
            gr.Checkbox(config.default_enhance_checkbox, label="Enhance", container=False, min_width=90),
            gr.Checkbox(
                config.default_advanced_checkbox, label="Advanced", container=False, min_width=90,
                elem_id="advanced_checkbox",
            ),
        )  # fmt: skip


def input_panel(config: Config) -> tuple[gr.Column, Describe, Metadata]:
    """The tabs of picture inputs; the one that reads parameters out of pictures is open."""
    panel = gr.Column(visible=config.default_image_prompt_checkbox, elem_id="input_image_panel")
    with panel, gr.Tabs(selected="metadata_tab"):
        for place, tab_id in IMAGE_TABS:
            with gr.Tab(place, id=tab_id):
                gr.HTML(markup.notes([PANELS_TO_COME[place]]))
        with gr.Tab("Describe", id="describe_tab"):
            describe = _describe_tab(config)
        with gr.Tab("Metadata", id="metadata_tab"):
            picture = gr.File(
                label="For images created by Fooocus", file_types=[".png", ".jpg", ".jpeg", ".webp"],
                height=130, elem_id="metadata_picture",
            )  # fmt: skip
            shown = gr.JSON(label="Metadata", visible=False, max_height=320, elem_id="metadata_json")
            apply = gr.Button("Apply Metadata", visible=False, elem_id="apply_metadata")
    return panel, describe, Metadata(picture=picture, shown=shown, apply=apply)


def _describe_tab(config: Config) -> Describe:
    chosen = [content.value for content in ContentType if content.value in config.default_describe_content_type]
    with gr.Row():
        with gr.Column(min_width=220):
            picture = gr.Image(
                label="Image", type="filepath", sources=["upload", "clipboard"], height=260, elem_id="describe_picture"
            )
        with gr.Column(min_width=220):
            content = gr.CheckboxGroup(
                [content.value for content in ContentType], value=chosen, label="Content Type",
                elem_id="describe_content",
            )  # fmt: skip
            set_styles = gr.Checkbox(
                config.default_describe_apply_prompts_checkbox, label="Apply Styles", container=False,
                elem_id="describe_styles",
            )  # fmt: skip
            button = gr.Button("Describe this Image into Prompt", elem_id="describe_button")
            size = gr.HTML("", elem_id="describe_size")
    return Describe(picture=picture, size=size, content=content, set_styles=set_styles, button=button)


def enhance_panel(*, is_open: bool) -> gr.Column:
    """The panel that says that enhancing is to come."""
    panel = gr.Column(visible=is_open, elem_id="enhance_panel")
    with panel:
        gr.HTML(markup.notes([PANELS_TO_COME["enhance"]]))
    return panel


def settings_tab(
    controls: Controls,
    *,
    presets: list[str],
    preset: str,
    link: str,
    api_enabled: bool,
    extensions: Sequence[tuple[str, Callable[[], None]]] = (),
) -> Extras:
    """The right column's tabs.

    Args:
        extensions: title and content of further tabs.
    """
    with gr.Tabs():
        with gr.Tab("Settings"):
            chosen, ratios, history, api = _settings(controls, presets, preset, link, api_enabled)
        with gr.Tab("Styles"):
            search = gr.Textbox(placeholder=STYLES_SEARCH, show_label=False, container=False, elem_id="style_search")
            controls.put_rest("Styles")
        with gr.Tab("Models"):
            controls.put("base_model_name", "refiner_model_name", "refiner_switch", "loras")
            controls.put_rest("Models")
            refresh = gr.Button("🔄 Refresh All Files", elem_id="refresh_files")
        with gr.Tab("Advanced"):
            controls.put("guidance_scale", "sharpness")
            controls.put_rest("Advanced")
            debug = gr.Checkbox(label="Developer Debug Mode", elem_id="developer_debug_mode", container=False)
            debug_panel = _debug_tabs(controls)
        for title, fill in extensions:
            with gr.Tab(title):
                fill()
    return Extras(
        preset=chosen, ratios=ratios, history=history, api_enabled=api, style_search=search, refresh=refresh,
        debug_mode=debug, debug_panel=debug_panel,
    )  # fmt: skip


def _settings(
    controls: Controls, presets: list[str], preset: str, link: str, api_enabled: bool
) -> tuple[gr.Dropdown | None, gr.Accordion, gr.HTML, gr.Checkbox]:
    chosen = gr.Dropdown(presets, value=preset, label="Preset", elem_id="preset_selection") if presets else None
    controls.put("performance_selection")
    size = str(controls.default("aspect_ratios_selection"))
    with gr.Accordion(ratios_title(size), open=False, elem_id="aspect_ratios_accordion") as ratios:
        controls.put("aspect_ratios_selection")
    controls.put("image_number", "output_format", "negative_prompt", "image_seed")
    controls.put_rest("Settings")
    history = gr.HTML(link, elem_id="history_link")
    with gr.Accordion("API", open=False, elem_id="api_panel"):
        api = gr.Checkbox(
            api_enabled, label="Enable API", elem_id="api_enabled", container=False,
            info="Other programs may make pictures here. Takes effect at once and is remembered.",
        )  # fmt: skip
        gr.HTML(
            '<p class="focale-history"><a href="docs" target="_blank">How to call it</a> (while it is enabled)</p>',
            elem_id="api_link",
        )
    return chosen, ratios, history, api


def ratios_title(size: str) -> str:
    """Title of the accordion with the chosen size."""
    return f"Aspect Ratios: {aspect_label(size)}"


def _debug_tabs(controls: Controls) -> gr.Column:
    panel = gr.Column(visible=False, elem_id="debug_panel")
    with panel, gr.Tabs():
        with gr.Tab("Debug Tools"):
            controls.put(
                "adm_scaler_positive", "adm_scaler_negative", "adm_scaler_end", "refiner_swap_method", "adaptive_cfg",
                "clip_skip", "sampler_name", "scheduler_name", "vae_name", "generate_image_grid", "overwrite_step",
                "overwrite_switch", "overwrite_width", "overwrite_height",
            )  # fmt: skip
            controls.put_rest("Debug Tools")
        for place in ("Control", "Inpaint"):
            with gr.Tab(place):
                gr.HTML(markup.notes([NOT_YET]))
                controls.put_rest(place)
        with gr.Tab("FreeU"):
            controls.put_rest("FreeU")
    return panel
