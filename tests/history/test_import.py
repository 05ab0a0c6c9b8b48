"""Importing what other programs and earlier versions kept."""

import json
import sqlite3
from pathlib import Path

import pytest
from tinydb import TinyDB

from modules.choices import Source, TaskStatus
from modules.errors import InvalidRequest
from modules.history import History
from modules.history_import import Imported, import_file, output_path, record_of
from modules.record import Record
from modules.request import GenerationRequest

COLUMNS = (
    "id INTEGER PRIMARY KEY, task_id TEXT, req_params JSON, in_queue_mills INTEGER, start_mills INTEGER, "
    "finish_mills INTEGER, task_status TEXT, progress REAL, webhook_url TEXT, result JSON"
)
PARAMS = {
    "prompt": "a cat",
    "aspect_ratios_selection": "1152×896",
    "loras": [True, "None", 1.0, False, "x.safetensors", 0.5],
    "image_seed": 2**63 - 1,
}


def old_database(path: Path) -> Path:
    """A database as FooocusAPI leaves it: a finished task, one that never ran, one that was cut off."""
    rows = [
        ("a" * 32, json.dumps(PARAMS), 10, 20, 30, "finished", 100, None,
         json.dumps(["http://127.0.0.1:7866/outputs/2024-08-01/2024-08-01_10-00-00_1234.png"])),
        ("b" * 32, json.dumps(PARAMS), 40, None, None, None, None, "", None),
        ("c" * 32, None, 50, 60, None, "running", 40, "http://h/", "[]"),
    ]  # fmt: skip
    database = sqlite3.connect(path)
    with database:
        database.execute(f"CREATE TABLE generate_record ({COLUMNS})")
        for row in rows:
            database.execute(f"INSERT INTO generate_record VALUES (NULL{', ?' * len(row)})", row)
    database.close()
    return path


def test_a_fooocusapi_database_is_imported_once(tmp_path: Path) -> None:
    path = old_database(tmp_path / "db.sqlite3")
    with History(tmp_path) as history:
        assert import_file(history, path) == Imported(added=3, known=0, unusable=0)
        assert import_file(history, path) == Imported(added=0, known=3, unusable=0)
        finished, waiting, running = history.each()
    assert finished.task_status is TaskStatus.FINISHED
    assert finished.result == ("2024-08-01/2024-08-01_10-00-00_1234.png",)
    assert (finished.in_queue_mills, finished.start_mills, finished.finish_mills) == (10, 20, 30)
    assert finished.req_params["loras"][1] == {"enabled": False, "model_name": "x.safetensors", "weight": 0.5}
    request = GenerationRequest.model_validate(finished.req_params)
    assert (request.prompt, request.aspect_ratios_selection, request.image_seed) == ("a cat", "1152*896", 2**63 - 1)
    assert waiting.task_status is running.task_status is TaskStatus.ERROR
    assert "not ended" in waiting.error
    assert (waiting.start_mills, waiting.progress, waiting.result, waiting.webhook_url) == (-1, -1, (), "")
    assert (running.progress, running.req_params, running.webhook_url) == (40, {}, "http://h/")


def test_importing_leaves_the_old_database_as_it_was(tmp_path: Path) -> None:
    path = old_database(tmp_path / "db.sqlite3")
    content = path.read_bytes()
    with History(tmp_path) as history:
        import_file(history, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("indent", [None, 2])
def test_a_plain_tinydb_file_is_imported(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "tasks.json"
    with TinyDB(path, indent=indent) as db:
        for number in (2, 10, 1):
            db.table("tasks").insert({"task_id": f"{number:032x}", "task_status": "stop", "in_queue_mills": number})
        db.table("tasks").insert({"nothing": "of ours"})
        db.insert({"task_id": None, "req_params": PARAMS, "task_status": "finished"})
    with History(tmp_path) as history:
        assert import_file(history, path) == Imported(added=4, known=0, unusable=1)
        assert import_file(history, path) == Imported(added=0, known=4, unusable=1)
        assert sorted(record.in_queue_mills for record in history.each()) == [-1, 1, 2, 10]


def test_an_exported_history_comes_back_equal(tmp_path: Path) -> None:
    kept = Record(
        task_id="d" * 32, task_status=TaskStatus.SKIP, req_params=PARAMS, result=("2026-11-22/a b.png",), seeds=(5,),
        source=Source.WEBUI, attempts=2, notes=("One.",), model="m", width=8, height=8, progress=12.5,
    )  # fmt: skip
    path = tmp_path / "export.jsonl"
    path.write_text(kept.model_dump_json() + "\n" + '{"task_id": "not whole\n', encoding="utf-8")
    with History(tmp_path) as history:
        assert import_file(history, path) == Imported(added=1, known=0, unusable=1)
        [record] = history.each()
    loras = record_of(kept.model_dump(mode="json")).req_params["loras"]
    assert record == kept.model_copy(update={"id": 1, "req_params": {**PARAMS, "loras": loras}})


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"hello", b'{"half": ', b"SQLite format 3\x00 but cut short"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with History(tmp_path) as history, pytest.raises(InvalidRequest, match="file"):
        import_file(history, path)


def test_another_sqlite_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite3"
    database = sqlite3.connect(path)
    with database:
        database.execute("CREATE TABLE other (id INTEGER)")
    database.close()
    with History(tmp_path) as history, pytest.raises(InvalidRequest, match="generate_record"):
        import_file(history, path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("2026-11-22/a.png", "2026-11-22/a.png"),
        ("http://localhost:8888/outputs/2026-11-22/a%20b.png?sig=1", "2026-11-22/a b.png"),
        ("/outputs/2026-11-22/a.png", "2026-11-22/a.png"),
        ("C:\\Fooocus\\outputs\\2026-11-22\\a.png", "2026-11-22/a.png"),
        ("/srv/pictures/2026-11-22/a.png", "2026-11-22/a.png"),
        ("outputs/../../etc/passwd", ""),
        ("http://elsewhere/a.png", ""),
        ("", ""),
    ],
)
def test_results_become_paths_below_the_output_folder(text: str, path: str) -> None:
    assert output_path(text) == path


@pytest.mark.parametrize("value", [None, "", 5, [], "x", {"a": 1}, [None], float("nan"), -3, True])
@pytest.mark.parametrize("column", Record.model_fields)
def test_no_value_of_an_old_row_stops_an_import(column: str, value: object) -> None:
    record = record_of({"task_id": "e" * 32, column: value})
    assert record is None or (record.task_status.is_final and len(record.task_id) == 32)
