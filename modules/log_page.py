"""The private log page of a day: one HTML file beside the pictures, newest picture on top."""

import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final
from urllib.parse import quote

from modules.errors import StorageFull
from modules.files_atomic import write_atomically
from modules.metadata import Json, Row

LOG_NAME: Final = "log.html"
SPLIT: Final = "<!--fooocus-log-split-->"  # head, entries, foot: how Fooocus finds the entries again
ENTRY_END: Final = "<!--entry-end-->\n"

_ENTRY_START: Final = re.compile(rb'\s*<div id="[^"]*" class="image-container" data-file="([^"]*)">')

_STYLE: Final = """
:root{color-scheme:dark}
body{margin:1.5rem;background:#121212;color:#e0e0e0;font:14px/1.45 system-ui,sans-serif}
a{color:#bb86fc}
h1{font-size:1.2rem}
.image-container{display:flex;flex-wrap:wrap;gap:1rem;padding:1rem 0;border-top:1px solid #3a3a3a}
.image-container.gone{display:none}
.picture{flex:0 1 512px;max-width:100%}
.picture img{max-width:min(512px,100%);height:auto;display:block;border-radius:6px}
.facts{flex:1 1 22rem;min-width:0}
table{border-collapse:collapse;width:100%}
th,td{border:1px solid #3a3a3a;padding:.3rem .5rem;text-align:start;vertical-align:top}
th{width:11rem;font-weight:600;color:#bdbdbd}
td{white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer}
ul{margin:.3rem 0;padding-inline-start:1.2rem}
button{margin-top:.6rem;padding:.45rem 1rem;border:0;border-radius:6px;cursor:pointer}
button{background:#3d3550;color:#fff}
button:focus-visible,a:focus-visible,summary:focus-visible{outline:2px solid #bb86fc;outline-offset:2px}
"""

_SCRIPT: Final = """
addEventListener("error", function (event) {
  var box = event.target.tagName === "IMG" && event.target.closest(".image-container");
  if (box) box.classList.add("gone");
}, true);
function copyOldWay(text) {
  var box = document.createElement("textarea");
  box.value = text;
  document.body.append(box);
  box.select();
  var done = document.execCommand("copy");
  box.remove();
  return done ? Promise.resolve() : Promise.reject();
}
addEventListener("click", function (event) {
  var button = event.target.closest("button[data-copy]");
  if (!button) return;
  var text = button.dataset.copy, label = button.textContent;
  (navigator.clipboard ? navigator.clipboard.writeText(text).catch(function () { return copyOldWay(text); })
    : copyOldWay(text)).then(function () { button.textContent = "Copied"; },
    function () { button.textContent = "Copying failed"; }).then(function () {
      setTimeout(function () { button.textContent = label; }, 1500);
    });
});
"""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One picture on the page.

    file_name: name of the file in the day's folder.  rows: the parameter table.
    full_prompt, full_negative_prompt: every fragment that was encoded.
    clipboard: the JSON object that "Copy to Clipboard" copies, see `metadata.clipboard_values`.
    """

    file_name: str
    rows: Sequence[Row]
    full_prompt: Sequence[str]
    full_negative_prompt: Sequence[str]
    clipboard: Mapping[str, Json]


def add_entry(folder: Path, entry: LogEntry) -> None:
    """Puts an entry on top of `folder/log.html`, which is made if need be; entries of Fooocus stay below.

    Raises:
        StorageFull: the page cannot be written.
    """
    try:
        with _locked(folder):
            _write(folder, entry_html(entry).encode("utf-8", "replace"), _entries(folder))
    except OSError as error:
        raise StorageFull(f"The log page of {str(folder)!r} could not be written: {error}.") from error


def remove_entry(folder: Path, file_name: str) -> bool:
    """Takes the entries of a deleted picture off the page; True if there was one.

    Raises:
        StorageFull: the page cannot be written.
    """
    if not (folder / LOG_NAME).is_file():
        return False
    try:
        with _locked(folder):
            chunks = _entries(folder).split(ENTRY_END.encode())
            kept = [chunk for chunk in chunks if not _is_of(chunk, file_name)]
            if len(kept) < len(chunks):
                _write(folder, ENTRY_END.encode().join(kept))
    except OSError as error:
        raise StorageFull(f"The log page of {str(folder)!r} could not be written: {error}.") from error
    return len(kept) < len(chunks)


def entry_html(entry: LogEntry) -> str:
    """The markup of one entry; every value is escaped."""
    name, link = escape(entry.file_name), escape(quote(entry.file_name))
    anchor = escape(re.sub(r"[.\s]", "_", entry.file_name))
    facts = "".join(_row_html(row.label, escape(_shown(row.value))) for row in entry.rows)
    raw = _fold_out("Positive", entry.full_prompt) + _fold_out("Negative", entry.full_negative_prompt)
    copied = json.dumps(entry.clipboard, ensure_ascii=False)
    copied = copied.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;")  # stands between single quotes
    return (
        f'<div id="{anchor}" class="image-container" data-file="{name}">\n'
        f'<div class="picture"><a href="{link}"><img src="{link}" loading="lazy" alt="{name}"></a>'
        f"{name}</div>\n"
        f'<div class="facts"><table><tbody>{facts}{_row_html("Full raw prompt", raw)}</tbody></table>\n'
        f"<button type=\"button\" data-copy='{copied}'>Copy to Clipboard</button></div>\n"
        f"</div>\n{ENTRY_END}"
    )


def page_head(day: str) -> str:
    """Everything before the entries; its policy allows this very script and style, and pictures."""
    policy = (
        f"default-src 'none'; img-src 'self' file: data:; style-src '{_hash(_STYLE)}'; "
        f"script-src '{_hash(_SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    title = f"Focale Log {escape(day)} (private)"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n<script>{_SCRIPT}</script>\n"
        f"</head>\n<body>\n<h1>{title}</h1>\n"
        "<p>Nobody but you sees this page unless you share the folder. "
        "Copied parameters can be pasted into the prompt box.</p>\n"
    )


def _is_of(chunk: bytes, file_name: str) -> bool:
    start = _ENTRY_START.match(chunk)
    return start is not None and start[1] == escape(file_name).encode("utf-8", "replace")


def _row_html(label: str, value_html: str) -> str:
    return f'<tr><th scope="row">{escape(label)}</th><td dir="auto">{value_html}</td></tr>\n'


def _fold_out(label: str, fragments: Sequence[str]) -> str:
    items = "".join(f'<li dir="auto">{escape(fragment)}</li>' for fragment in fragments)
    content = f"<ul>{items}</ul>" if items else "<p>empty</p>"
    return f"<details><summary>{label}</summary>{content}</details>"


def _shown(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _entries(folder: Path) -> bytes:
    """The part of the page between the marks; bytes, because a long day's page is megabytes for each picture."""
    page = folder / LOG_NAME
    if not page.is_file():
        return b""
    content = page.read_bytes()
    mark = SPLIT.encode()
    first, last = content.find(mark), content.rfind(mark)
    if first < last:
        return content[first + len(mark) : last].lstrip(b"\n")
    page.replace(folder / "log.unreadable.html")  # not ours and not Fooocus': keep it, begin anew
    return b""


def _write(folder: Path, *entries: bytes) -> None:
    head, foot = f"{page_head(folder.name)}{SPLIT}\n".encode(), f"{SPLIT}\n</body>\n</html>\n".encode()
    # Not waiting for the disk: the page is derived, and a kill cannot tear a renamed file.
    write_atomically(folder / LOG_NAME, b"".join((head, *entries, foot)), durable=False)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


if sys.platform == "win32":
    import msvcrt

    @contextmanager
    def _locked(folder: Path) -> Iterator[None]:
        """One writer of a day's page at a time, among all processes."""
        with (folder / ".log.lock").open("a+b") as stream:
            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)
            try:
                yield
            finally:
                stream.seek(0)
                msvcrt.locking(stream.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    @contextmanager
    def _locked(folder: Path) -> Iterator[None]:
        """One writer of a day's page at a time, among all processes; the folder itself is the lock."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
