"""The pieces of HTML the page shows: empty viewer, preview, progress bar, messages. All text is escaped here."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from modules.ui.labels import ratio
from modules.ui.run_view import RunView, seeds_shown

FILE_ROUTE = "gradio_api/file="
LENS = (
    '<svg viewBox="0 0 48 48" width="56" height="56" fill="none" stroke="currentColor" stroke-width="2" '
    'aria-hidden="true"><circle cx="24" cy="24" r="20"/><circle cx="24" cy="24" r="9"/>'
    '<path d="M24 4 32 19M44 24 28 32M24 44 16 29M4 24 20 16M38 10 31.5 27M10 38 16.5 21"/></svg>'
)


def file_url(path: Path) -> str:
    """Where the page's browser finds a file of the output folder, relative to the page."""
    return FILE_ROUTE + quote(path.as_posix())


def stage(view: RunView, root: Path, hint: str = "") -> str:
    """The viewer while there is no gallery: the empty state, or the running picture and those already done.

    Args:
        root: the output folder.
        hint: a sentence for the empty state.
    """
    if not view.is_busy:
        return _empty(hint)
    thumbnails = "".join(
        f'<img src="{escape(file_url(root / path))}" alt="Finished picture {number}">'
        for number, path in enumerate(view.pictures, 1)
        if view.shows_each_picture
    )
    strip = f'<div class="focale-strip" aria-label="Finished Images">{thumbnails}</div>' if thumbnails else ""
    return f'<div class="focale-stage is-busy">{_picture(view)}{strip}</div>'


def _picture(view: RunView) -> str:
    if view.preview is None:
        return f'<div class="focale-wait">{LENS}</div>'
    data = base64.b64encode(view.preview).decode()
    return f'<img class="focale-preview" alt="Preview" src="data:image/jpeg;base64,{data}">'


def _empty(hint: str) -> str:
    note = f'<p class="focale-hint">{escape(hint)}</p>' if hint else ""
    return (
        f'<div class="focale-stage is-empty">{LENS}<p>Describe a picture below and press Generate.</p>'
        f"<p><kbd>Ctrl</kbd> + <kbd>Enter</kbd> starts, too.</p>{note}</div>"
    )


def progress_bar(view: RunView) -> str:
    """The bar with its text; nothing when no run is in work."""
    if not view.is_busy:
        return ""
    return (
        f'<div class="focale-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{view.percent}"><div class="focale-fill" style="width:{view.percent}%"></div>'
        f'<span class="focale-spin"></span><span class="focale-step">{escape(view.text)}</span>'
        f"{_left(view.left_s)}"
        f'<span class="focale-percent">{view.percent} %</span></div>'
    )


def _left(left_s: int | None) -> str:
    if left_s is None:
        return ""
    minutes, seconds = divmod(left_s, 60)
    return f'<span class="focale-left">{f"{minutes} min " if minutes else ""}{seconds} s left</span>'


def messages(view: RunView) -> str:
    """What went wrong, how the run ended, and what is worth knowing."""
    lines = [_line("problem", view.problem, "alert")] if view.problem else []
    lines += [_line("outcome", view.outcome, "status")] if view.outcome else []
    return "".join(lines) + notes(view.notes)


def problem(sentence: str) -> str:
    """One sentence about something that cannot be done."""
    return _line("problem", sentence, "alert")


def notes(sentences: Sequence[str]) -> str:
    """Sentences worth knowing: the first one, the others behind it."""
    if len(sentences) < 2:
        return "".join(_line("note", sentence, "status") for sentence in sentences)
    first, *others = sentences
    more = "".join(f"<p>{escape(sentence)}</p>" for sentence in others)
    return (
        f'<details class="focale-message is-note" role="status"><summary>{escape(first)} '
        f"<span>{len(others)} more</span></summary>{more}</details>"
    )


def picture_size(width: int, height: int, recommended: str) -> str:
    """Size and ratio of a picture, and the listed size nearest to it."""
    size = f"{width} × {height}, {width / height:.2f}, {ratio(width, height)}"
    return f'<p class="focale-size">Image Size: {size}<br>Recommended Size: {escape(recommended)}</p>'


def missing(sentences: Sequence[str]) -> str:
    """What is said about missing files."""
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _line(kind: str, text: str, role: str) -> str:
    return f'<p class="focale-message is-{kind}" role="{role}">{escape(text)}</p>'


def seeds(view: RunView) -> str:
    """The seeds of the pictures, in their order."""
    shown = "".join(f"<li><span>{number}</span>{seed}</li>" for number, seed in seeds_shown(view))
    return f'<ul class="focale-seeds" aria-label="Seeds"><li>Seeds</li>{shown}</ul>' if shown else ""


def history_link(root: Path, view: RunView) -> str:
    """A link to the log page of the day of the newest picture, or of the newest day there is."""
    folder = (root / view.pictures[-1]).parent if view.pictures else newest_day(root)
    page = folder / "log.html" if folder else None
    if page is None or not page.is_file():
        return '<p class="focale-history is-off">📚 History Log (empty)</p>'
    return f'<p class="focale-history"><a href="{escape(file_url(page))}" target="_blank">📚 History Log</a></p>'


def day_folders(root: Path) -> list[Path]:
    """The folders that hold results, oldest first."""
    return sorted(path for path in root.glob("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]") if path.is_dir())


def newest_day(root: Path) -> Path | None:
    """The newest folder that has a log page."""
    return next((folder for folder in reversed(day_folders(root)) if (folder / "log.html").is_file()), None)
