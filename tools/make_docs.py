"""Writes the documents that follow from the code: docs/parameters.md and docs/status.md. `--check` only compares."""

import argparse
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from modules.flags import flags_without_effect  # noqa: E402
from modules.params import (  # noqa: E402
    PAGE_GROUPS,
    DeliveryParams,
    EnhanceCtrl,
    ImagePrompt,
    Lora,
    ParamGroup,
    ui_of,
)

SINCE = "0.1"
LISTED = (*PAGE_GROUPS, DeliveryParams)
ROWS = (Lora, ImagePrompt, EnhanceCtrl)

PARAMETERS_HEAD = """# Parameters

Every parameter of a request, by its group on the page. Names are the keys of the REST API, of `/generate` for the
Gradio client, and, with dashes, the flags of `python launch.py generate`. All are optional. Defaults are the shipped
ones; `config.txt` and `--preset` change them. This file is generated from `modules/params.py`
by `python tools/make_docs.py`.

The published table of FooocusAPI prints 1.5 and 0.8 for `adm_scaler_negative` and `adm_scaler_end`; its running
versions and the page of Fooocus use 0.8 and 0.3, and so does Focale.
"""

STATUS_HEAD = """# Status

What a request may already say but this version does not do yet. Such a request is refused with a sentence rather than
answered with a wrong picture; a parameter whose feature is not asked for is stored and changes nothing. A flag of the
list at the end is accepted, and the log says that nothing follows from it. This file is generated from
`modules/params.py` and `modules/flags.py` by `python tools/make_docs.py`.
"""


def range_text(field: FieldInfo) -> str:
    """The allowed values of a field in a few words."""
    low: Any = None
    high: Any = None
    for mark in field.metadata:
        low = getattr(mark, "ge", low)
        high = getattr(mark, "le", high)
    if low is not None or high is not None:
        return f"{_number(low)}–{_number(high)}"
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return ", ".join(f"`{value}`" for value in kind)
    if kind is bool:
        return "`true`, `false`"
    return ""


def default_text(field: FieldInfo) -> str:
    """The default as JSON would show it, shortened."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        if value and isinstance(value[0], BaseModel):
            return f"{len(value)} rows" if len(value) > 1 else "1 row"
        return ", ".join(str(item) for item in value) or "[]"
    return "2^63−1" if value == 2**63 - 1 else f"{value}" if value != "" else '""'


def _number(value: Any) -> str:
    return (
        ""
        if value is None
        else "2^63−1"
        if value == 2**63 - 1
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def table(group: type[ParamGroup], names: Iterable[str]) -> list[str]:
    """A table of some fields of a group."""
    lines = ["| key | on the page | default | values | what it does | since |", "| --- | --- | --- | --- | --- | --- |"]
    for name in names:
        field = group.model_fields[name]
        since = SINCE if ui_of(group, name).works else "later"
        cells = (
            f"`{name}`", field.title or "", default_text(field), range_text(field), field.description or "", since
        )  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return lines


def own_fields(group: type[ParamGroup]) -> list[str]:
    """Fields that the group itself declares."""
    return [name for name in group.__annotations__ if name in group.model_fields]


def parameters_page() -> str:
    """The text of docs/parameters.md."""
    lines = [PARAMETERS_HEAD]
    for group in LISTED:
        lines += [f"## {group.label}", "", (group.__doc__ or "").strip(), "", *table(group, own_fields(group)), ""]
    for group in ROWS:
        lines += [
            f"## Rows: {group.label}",
            "",
            (group.__doc__ or "").strip(),
            "",
            *table(group, own_fields(group)),
            "",
        ]
    return "\n".join(lines)


def status_page() -> str:
    """The text of docs/status.md."""
    lines = [STATUS_HEAD]
    for group in LISTED:
        missing = [name for name in own_fields(group) if not ui_of(group, name).works]
        if missing:
            lines += [f"## {group.label}", ""]
            lines += [f"- `{name}`: {group.model_fields[name].description}" for name in missing]
            lines.append("")
    lines += ["## Flags of the server", ""]
    lines += [f"- `{option}`: {help}" for option, help in flags_without_effect().items()]
    return "\n".join([*lines, ""])


PAGES = {"parameters.md": parameters_page, "status.md": status_page}


def stale_pages(folder: Path = ROOT / "docs") -> list[str]:
    """Names of pages whose file differs from what the code says."""
    return [
        name
        for name, text in PAGES.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text()
    ]


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is stale")
    if parser.parse_args().check:
        stale = stale_pages()
        if stale:
            sys.stderr.write(f"Stale: {', '.join(stale)}; run python tools/make_docs.py\n")
        return 1 if stale else 0
    for name, text in PAGES.items():
        (ROOT / "docs" / name).write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
