"""The history commands, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modules.history import FILE_NAME, History
from modules.history_cli import main
from modules.record import Record

PICTURE = "2026-11-22/2026-11-22_10-00-00_{}.png"


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """An output folder with three ended tasks, their pictures, and a task that runs."""
    day = tmp_path / "2026-11-22"
    day.mkdir()
    with History(tmp_path) as history:
        for number in range(1, 4):
            picture = PICTURE.format(number)
            (tmp_path / picture).write_bytes(b"png")
            history.add(
                Record(
                    task_id=f"{number:032x}", task_status="finished", result=(picture,), in_queue_mills=1000 * number,
                    req_params={"prompt": "p" * 500},
                )
            )  # fmt: skip
        history.add(Record(task_id=f"{4:032x}", task_status="running", in_queue_mills=4000, start_mills=4000))
    return tmp_path


@pytest.fixture
def run(outputs: Path, capsys: pytest.CaptureFixture[str]):
    def command(*words: str | Path) -> tuple[int, str]:
        code = main([*map(str, words), "--output-path", str(outputs)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return command


def test_check_finds_nothing_in_a_sound_folder(run, outputs: Path) -> None:
    os.utime(outputs / PICTURE.format(1), (1, 1))
    code, text = run("check")
    assert code == 0
    assert "4 records and 3 pictures" in text


def test_check_names_missing_and_strange_pictures_and_damage(run, outputs: Path) -> None:
    (outputs / PICTURE.format(2)).unlink()
    stray = outputs / "2026-11-22" / "stray.webp"
    stray.write_bytes(b"")
    os.utime(stray, (1, 1))
    (outputs / "2026-11-22" / "log.html").write_text("no picture")
    log = outputs / FILE_NAME
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0].replace(b"ppp", b"qqq"), *lines[1:], b"00"]))
    before = log.read_bytes()
    code, text = run("check")
    assert code == 1
    assert "checksum is wrong" in text
    assert f"{PICTURE.format(2)} of task {2:032x}" in text
    assert "2026-11-22/stray.webp" in text
    assert PICTURE.format(1) not in text, "a picture newer than the start of a running task may still get its record"
    assert "2 bytes of an unfinished transaction" in text
    assert log.read_bytes() == before


def test_check_shortens_long_lists(run, outputs: Path) -> None:
    for number in range(30):
        stray = outputs / "2026-11-22" / f"stray{number:02}.png"
        stray.write_bytes(b"")
        os.utime(stray, (1, 1))
    assert "10 more" in run("check")[1]
    assert "stray29" in run("check", "--all")[1]


def test_compact_shrinks_the_log(run, outputs: Path) -> None:
    with History(outputs) as history:
        for progress in range(30):
            history.update(f"{4:032x}", progress=progress)
    size = (outputs / FILE_NAME).stat().st_size
    code, text = run("compact")
    assert code == 0
    assert str(size) in text
    assert (outputs / FILE_NAME).stat().st_size < size


def test_export_and_import_round_trip(run, outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("x") / "export.jsonl"
    assert run("export", "--out", target)[0] == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == [1, 2, 3, 4]
    assert run("export")[1] == target.read_text()
    assert "File exists" in run("export", "--out", target)[1]
    other = target.parent / "other"
    assert main(["import", str(target), "--output-path", str(other)]) == 0
    with History(outputs, read_only=True) as ours, History(other) as theirs:
        assert theirs.page()[1:] == ours.page()
        assert theirs.get(f"{1:032x}") == ours.get(f"{1:032x}")
        assert theirs.get(f"{4:032x}").error


def test_prune_removes_records_and_pictures_if_asked(run, outputs: Path) -> None:
    assert run("prune")[0] == 2
    assert "1 records and 0 pictures" in run("prune", "--keep", "2")[1]
    assert (outputs / PICTURE.format(1)).exists()
    assert "2 records and 2 pictures" in run("prune", "--older-than", "0", "--pictures")[1]
    assert not (outputs / PICTURE.format(2)).exists()
    assert (outputs / PICTURE.format(1)).exists()
    with History(outputs) as history:
        assert [record.id for record in history.each()] == [4]


@pytest.mark.parametrize("size", ["x", "-1", "1T", ""])
def test_prune_refuses_what_is_no_size(run, size: str) -> None:
    with pytest.raises(SystemExit):
        run("prune", "--max-bytes", size)


def test_prune_by_size(run, outputs: Path) -> None:
    with History(outputs, read_only=True) as history:
        size = history.storage.rows.live_bytes
    assert "1 records" in run("prune", "--max-bytes", str(size - 1))[1]
    assert "0 records" in run("prune", "--max-bytes", "1MiB")[1]


def test_commands_that_write_say_when_a_server_is_running(run, outputs: Path) -> None:
    with History(outputs):
        for command in (("compact",), ("prune", "--keep", "1"), ("import", outputs / FILE_NAME)):
            code, text = run(*command)
            assert code == 1
            assert f"process {os.getpid()}" in text
        assert run("check")[0] == 0
        assert run("export")[0] == 0


@pytest.mark.parametrize("command", ["check", "compact", "export"])
def test_a_folder_without_history_is_told_and_left_alone(tmp_path: Path, capsys, command: str) -> None:
    assert main([command, "--output-path", str(tmp_path)]) == 1
    assert "No such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_commands_run_as_a_program_without_the_engine_or_the_page(outputs: Path) -> None:
    code = (
        "import sys; from modules.history_cli import main; main(['check', '--output-path', sys.argv[1]]);"
        "print({'torch', 'gradio', 'fastapi', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, outputs], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
