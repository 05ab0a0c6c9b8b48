"""The log page: valid, escaped, newest first, and in step with the pictures."""

import base64
import hashlib
import json
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modules import log_page
from modules.image_grid import contact_sheet
from modules.log_page import LogEntry, add_entry, entry_html, remove_entry
from modules.metadata import Row

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Reader(HTMLParser):
    """Collects what a browser would show, and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.files: list[str] = []
        self.copied: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.meta: list[dict[str, str | None]] = []
        self.raw: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        assert not any(name.startswith("on") for name in values)
        if tag == "meta":
            self.meta.append(values)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "li"):
            self.cells.append("")
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.files += [value for name, value in attrs if name == "data-file" and value is not None]
        self.copied += [value for name, value in attrs if name == "data-copy" and value is not None]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.raw[self.open[-1]] = data
        elif self.open and self.open[-1] in ("td", "li"):
            self.cells[-1] += data


def entry(name: str = "a.png", prompt: str = "a red apple") -> LogEntry:
    return LogEntry(
        file_name=name,
        rows=(
            Row("Prompt", "prompt", prompt),
            Row("Steps", "steps", 30),
            Row("Scheme", "metadata_scheme", False),
        ),
        full_prompt=(prompt, "more"),
        full_negative_prompt=(),
        clipboard={"prompt": prompt, "steps": 30},
    )


def read(folder: Path) -> Reader:
    return Reader((folder / "log.html").read_text(encoding="utf-8"))


def test_newest_entry_is_on_top_and_old_ones_survive(tmp_path: Path) -> None:
    for name in ("first.png", "second.jpeg", "third x.webp"):
        add_entry(tmp_path, entry(name))
    page = read(tmp_path)
    assert page.files == ["third x.webp", "second.jpeg", "first.png"]
    assert page.ids == ["third_x_webp", "second_jpeg", "first_png"]


def test_page_has_three_parts_for_programs_that_split_it(tmp_path: Path) -> None:
    add_entry(tmp_path, entry(prompt="<!--fooocus-log-split-->"))
    add_entry(tmp_path, entry("b.png"))
    text = (tmp_path / "log.html").read_text()
    assert len(text.split("<!--fooocus-log-split-->")) == 3


def test_markup_in_a_prompt_stays_text(tmp_path: Path) -> None:
    attack = "</td><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & <!--entry-end-->"
    add_entry(tmp_path, entry(prompt=attack))
    page = read(tmp_path)
    assert page.cells[0] == attack
    assert page.cells[-2:] == [attack, "more"]
    assert len(re.findall("<script>", (tmp_path / "log.html").read_text())) == 1


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), st.text(max_size=40))
def test_any_text_is_copied_back_exactly(prompt: str, label: str) -> None:
    values = {"prompt": prompt, label: [1, None, prompt]}
    page = Reader(entry_html(LogEntry("a.png", (), (), (), values)))
    assert json.loads(page.copied[0]) == values


def test_policy_allows_exactly_the_script_and_style_of_the_page(tmp_path: Path) -> None:
    add_entry(tmp_path, entry())
    page = read(tmp_path)
    policy = next(meta["content"] or "" for meta in page.meta if meta.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_removed_picture_loses_its_entry_only(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "ab.png", 'c"&.png'):
        add_entry(tmp_path, entry(name))
    assert remove_entry(tmp_path, "b.png")
    assert remove_entry(tmp_path, 'c"&.png')
    assert not remove_entry(tmp_path, "b.png")
    assert read(tmp_path).files == ["ab.png", "a.png"]


def test_removing_without_a_page_makes_none(tmp_path: Path) -> None:
    assert not remove_entry(tmp_path, "a.png")
    assert list(tmp_path.iterdir()) == []


def test_entries_of_fooocus_stay_below_ours(tmp_path: Path) -> None:
    old = '<div id="old_png" class="image-container"><hr><img src="old.png"></div>'
    (tmp_path / "log.html").write_text(f"<html>{log_page.SPLIT}{old}{log_page.SPLIT}</html>")
    add_entry(tmp_path, entry("new.png"))
    add_entry(tmp_path, entry("newer.png"))
    assert remove_entry(tmp_path, "newer.png")
    assert read(tmp_path).ids == ["new_png", "old_png"]


def test_a_foreign_file_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "log.html").write_text("my notes")
    add_entry(tmp_path, entry())
    assert (tmp_path / "log.unreadable.html").read_text() == "my notes"
    assert read(tmp_path).files == ["a.png"]


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    threads = [threading.Thread(target=add_entry, args=(tmp_path, entry(f"{number}.png"))) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read(tmp_path).files) == sorted(f"{number}.png" for number in range(16))
    assert [path.name for path in tmp_path.iterdir()] == ["log.html"]


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (10, 4, 3)])
def test_contact_sheet_fills_rows_first_on_black(count: int, columns: int, rows: int) -> None:
    sheet = contact_sheet([Image.new("RGB", (6, 4), (index + 1, 0, 0)) for index in range(count)])
    assert sheet is not None
    assert sheet.size == (columns * 6, rows * 4)
    cells = [sheet.getpixel((column * 6 + 3, row * 4 + 2)) for row in range(rows) for column in range(columns)]
    assert cells == [(index + 1 if index < count else 0, 0, 0) for index in range(columns * rows)]


def test_no_contact_sheet_of_one_picture_or_of_mixed_sizes() -> None:
    assert contact_sheet([Image.new("RGB", (6, 4))]) is None
    assert contact_sheet([Image.new("RGB", (6, 4)), Image.new("RGB", (4, 6))]) is None
    assert contact_sheet([Image.new("RGB", (6, 4)), Image.new("L", (6, 4))]) is None
