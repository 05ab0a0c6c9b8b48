"""Colours and type of the page: system fonts only, one accent colour."""

import json
from pathlib import Path

import gradio as gr

STATIC = Path(__file__).resolve().parent / "static"
SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def make_theme() -> gr.themes.Base:
    """The theme, light and dark."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=SANS,
        font_mono=MONO,
    )
    return theme.set(
        body_background_fill="#f6f7f8",
        body_background_fill_dark="#111315",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#191c1f",
        background_fill_secondary="#f2f4f5",
        background_fill_secondary_dark="#1f2327",
        block_background_fill="*background_fill_primary",
        block_border_width="1px",
        block_border_color="#e3e6e8",
        block_border_color_dark="#2a2f34",
        border_color_primary="#dfe3e6",
        border_color_primary_dark="#2f353b",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_info_text_size="*text_xs",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="#ffffff",
        input_background_fill_dark="#14171a",
        input_border_width="1px",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_cancel_background_fill="#b42318",
        button_cancel_background_fill_hover="#912018",
        button_cancel_background_fill_dark="#b42318",
        button_cancel_background_fill_hover_dark="#d92d20",
        button_cancel_text_color="#ffffff",
        button_cancel_text_color_dark="#ffffff",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
        checkbox_background_color_selected="*primary_600",
        checkbox_border_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_500",
        checkbox_border_color_selected_dark="*primary_500",
        layout_gap="12px",
        block_padding="12px",
    )


def head(wanted: str | None = None) -> str:
    """Head markup: our rules on top of the theme, and the page's own script.

    Not Gradio's `css`: it puts every rule below its own container, where nothing can hang on the page's body.

    Args:
        wanted: "light" or "dark", unless the address says otherwise; None follows the browser.
    """
    rules, script = ((STATIC / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    start = f"window.focaleTheme = {json.dumps(wanted)};"
    return f"<style>{rules}</style><script>{start}\n{script}</script>"
