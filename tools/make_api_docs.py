"""Writes docs/api.md from the API's own schema. `--check` only compares."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from extensions.rest_api.extension import RestApi  # noqa: E402
from modules.assembly import build_services  # noqa: E402
from modules.settings import Settings  # noqa: E402

Schema = dict[str, Any]
PAGE = ROOT / "docs" / "api.md"
TAGS = {
    "generate": "Making pictures",
    "tasks": "Tasks",
    "files": "Pictures",
    "engines": "Lists",
    "tools": "Tools",
    "operation": "Operation",
    "legacy": "Routes of Fooocus-API v1 and v2",
}

HEAD = ROOT / "tools" / "api_head.md"


def schema() -> Schema:
    """The schema of a server with the shipped defaults."""
    rest = RestApi()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "presets").mkdir()
        (root / "presets" / "default.json").write_bytes((ROOT / "presets" / "default.json").read_bytes())
        settings = Settings.load(["--temp-path", str(root / "temp")], env={}, root=root, extra=[rest.add_arguments])
        settings.prepare()
        services = build_services(settings, inline=True)
        try:
            made: Schema = rest.schema(services)
        finally:
            services.history.close()
    return made


def api_page(described: Schema) -> str:
    """The text of docs/api.md."""
    lines = [HEAD.read_text(encoding="utf-8")]
    for tag, title in TAGS.items():
        lines += [f"## {title}", ""]
        for path, methods in described["paths"].items():
            for method, operation in methods.items():
                if tag in operation.get("tags", ()):
                    lines += operation_lines(method, path, operation)
    lines += ["## The record", "", *shape_lines(described["components"]["schemas"]["RecordReply"]), ""]
    return "\n".join(lines)


def operation_lines(method: str, path: str, operation: Schema) -> Iterator[str]:
    """One operation: what it does, its parameters, its statuses."""
    yield f"### `{method.upper()} {path}`"
    yield ""
    yield operation.get("description") or operation["summary"]
    yield ""
    parameters = [one for one in operation.get("parameters", ()) if one["in"] != "path"]
    if parameters:
        yield from ("| parameter | in | default | meaning |", "| --- | --- | --- | --- |")
        for one in parameters:
            default = one["schema"].get("default", "")
            yield f"| `{one['name']}` | {one['in']} | {default} | {one.get('description', '')} |"
        yield ""
    types = list(operation.get("requestBody", {}).get("content", ()))
    if types:
        yield f"Body: {', '.join(f'`{one}`' for one in types)}."
        yield ""
    yield f"Statuses: {', '.join(sorted(operation['responses']))}."
    yield ""


def shape_lines(shape: Schema) -> Iterator[str]:
    """The keys of a reply as a table."""
    yield from ("| key | type | meaning |", "| --- | --- | --- |")
    for name, field in shape["properties"].items():
        kinds = [one.get("type", "") for one in field.get("anyOf", [field])]
        yield f"| `{name}` | {' or '.join(kinds)} | {field.get('description', '')} |"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the page is stale")
    is_check = parser.parse_args().check
    text = api_page(schema())
    if not is_check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.stderr.write("docs/api.md is stale; run python tools/make_api_docs.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
