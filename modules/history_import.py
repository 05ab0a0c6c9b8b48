"""Imports records from a FooocusAPI database, a plain TinyDB file or an exported history."""

import json
import re
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from pydantic import ValidationError

from modules.choices import Source, TaskStatus
from modules.errors import InvalidRequest
from modules.history import History
from modules.record import Record

_SQLITE_MAGIC: Final = b"SQLite format 3\0"
_SQLITE_TABLE: Final = "generate_record"
_OUTPUT_URL: Final = re.compile(r"^(?:https?://[^/]+)?/?(?:.*/)?outputs/(?P<path>[^?#]+)", re.IGNORECASE)
_TASK_ID: Final = re.compile(r"^[0-9a-f]{32}$")
_IMPORTED: Final = uuid.UUID("6b1c1a6e-1f0e-5d0c-9a5e-2f3b6f0c7d11")  # names of tasks that came without an id
_BATCH: Final = 500

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: records added, records the history knew already, rows that are no records."""

    added: int
    known: int
    unusable: int


def import_file(history: History, path: Path) -> Imported:
    """Add every record of `path` that `history` does not hold; importing a file again adds nothing.

    Raises:
        InvalidRequest: the file is of no known kind.
        OSError: it cannot be read.
        StorageFull: the records cannot be written; those before stay.
    """
    added = known = unusable = 0
    batch: dict[str, Record] = {}
    for row in rows_of(path):
        record = record_of(row)
        if record is None:
            unusable += 1
        elif record.task_id in batch or history.get(record.task_id) is not None:
            known += 1
        else:
            batch[record.task_id] = record
        if len(batch) >= _BATCH:
            added += len(history.add_many(batch.values()))
            batch.clear()
    added += len(history.add_many(batch.values()))
    return Imported(added, known, unusable)


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file, oldest first; its content says what it is, not its name.

    Raises:
        InvalidRequest: it is of no known kind.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC:
            return _sqlite_rows(path)
        file.seek(0)
        first_line = _json_or_none(file.readline())
    if isinstance(first_line, dict) and "task_id" in first_line:
        return _json_lines(path)
    content = first_line if isinstance(first_line, dict) else _json_or_none(path.read_bytes())
    if not isinstance(content, dict):
        raise InvalidRequest("FILE", f"{path} is no FooocusAPI database, TinyDB file or exported history.")
    return _tinydb_rows(content)


def _sqlite_rows(path: Path) -> Iterator[Row]:
    """Rows of FooocusAPI's table by id; the database is opened read-only."""
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        database.row_factory = sqlite3.Row
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        if _SQLITE_TABLE not in {table["name"] for table in tables}:
            raise InvalidRequest("FILE", f"{path} has no table {_SQLITE_TABLE}; is it FooocusAPI's db.sqlite3?")
        for row in database.execute(f"SELECT * FROM {_SQLITE_TABLE} ORDER BY id"):
            yield dict(row)
    except sqlite3.DatabaseError as error:
        raise InvalidRequest("FILE", f"{path} cannot be read as an SQLite database: {error}.") from error
    finally:
        database.close()


def _json_lines(path: Path) -> Iterator[Row]:
    """The objects of an exported history; a line that is none comes as an empty row."""
    with path.open("rb") as file:
        for line in file:
            row = _json_or_none(line)
            yield row if isinstance(row, dict) else {}


def _tinydb_rows(tables: Mapping[str, object]) -> Iterator[Row]:
    """The documents of all tables of a TinyDB file, by table and id."""
    for documents in tables.values():
        if isinstance(documents, dict):
            for _, document in sorted(documents.items(), key=lambda item: _whole(item[0])):
                yield document if isinstance(document, dict) else {}


def record_of(row: Row) -> Record | None:
    """The record an old row means, or None if it means none.

    Nulls mean "unset". URLs of results become paths below the output folder, LoRAs given as flat lists of three
    values become objects. A task that had not ended is an error now: importing starts nothing.
    """
    params = _request(row.get("req_params"))
    if not row.get("task_id") and not params:
        return None
    known = {name: row[name] for name in Record.model_fields if row.get(name) is not None and name != "id"}
    values = known | {
        "task_id": _task_id(row),
        "req_params": params,
        "result": [path for item in _items(row.get("result")) if (path := output_path(str(item)))],
        "progress": row.get("progress") if row.get("progress") is not None else -1,
        **{name: _whole(row.get(name)) for name in ("in_queue_mills", "start_mills", "finish_mills")},
        **_ending(row),
    }
    if values.get("source") not in list(Source):
        values["source"] = Source.API
    try:
        return Record.model_validate(values)
    except ValidationError:
        return None


def _ending(row: Row) -> dict[str, object]:
    """The final status of an old row, with the reason if it never reached one."""
    status = str(row.get("task_status") or "").lower()
    if status in {final.value for final in TaskStatus if final.is_final}:
        return {"task_status": status, "error": str(row.get("error") or "")}
    if not status and _whole(row.get("finish_mills")) >= 0:
        return {"task_status": TaskStatus.FINISHED}
    return {"task_status": TaskStatus.ERROR, "error": "The task had not ended when its record was imported."}


def _task_id(row: Row) -> str:
    """The row's own task id, or one that the same row always gets."""
    task_id = str(row.get("task_id") or "").replace("-", "").lower()
    if _TASK_ID.match(task_id):
        return task_id
    return uuid.uuid5(_IMPORTED, json.dumps(dict(row), sort_keys=True, default=str)).hex


def _request(value: object) -> dict[str, Any]:
    """A stored request as an object, whether it was kept as one or as text."""
    request = _json_or_none(value) if isinstance(value, str | bytes) else value
    if not isinstance(request, dict):
        return {}
    loras = request.get("loras")
    if isinstance(loras, list) and loras and not isinstance(loras[0], dict):
        request["loras"] = _loras(loras)
    return request


def _loras(flat: list[Any]) -> list[dict[str, Any]]:
    """LoRA objects of a list of (enabled, model name, weight) rows or of one flat list of these values."""
    rows = flat if isinstance(flat[0], list) else [flat[place : place + 3] for place in range(0, len(flat), 3)]
    names = ("enabled", "model_name", "weight")
    return [dict(zip(names, row, strict=True)) for row in rows if isinstance(row, list) and len(row) == 3]


def output_path(text: str) -> str:
    """The path below the output folder that an old result names: a URL, a file path or such a path; "" if none."""
    path = text.replace("\\", "/")
    match = _OUTPUT_URL.match(path)
    path = unquote(match["path"]) if match else path
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or path.startswith(("http:", "https:")):
        return ""
    if path.startswith("/") or ":" in parts[0]:
        parts = parts[-2:]  # an absolute path of another machine: day and file
    return "/".join(parts)


def _items(value: object) -> list[object]:
    """A list kept as a list, as JSON text, or as one bare value."""
    if isinstance(value, str | bytes):
        parsed = _json_or_none(value)
        value = parsed if isinstance(parsed, list) else [value] if value else []
    return value if isinstance(value, list) else []


def _whole(value: object) -> int:
    """A whole number kept as a number or as text; -1 for anything else."""
    try:
        return int(float(value)) if isinstance(value, str | int | float) else -1
    except (ValueError, OverflowError):
        return -1


def _json_or_none(text: str | bytes) -> object:
    try:
        parsed: object = json.loads(text)
    except ValueError:
        return None
    return parsed
