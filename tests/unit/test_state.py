"""The remembered state: kept, private, and never a reason not to start."""

import stat
from pathlib import Path

import pytest

from modules.state import ServerState


def test_switches_and_secret_are_remembered(tmp_path: Path) -> None:
    first = ServerState(tmp_path / "state.json")
    assert first.api_enabled, "the API is on by default"
    assert not first.queue_paused
    first.api_enabled = False
    first.queue_paused = True
    later = ServerState(tmp_path / "state.json")
    assert not later.api_enabled
    assert later.queue_paused
    assert later.secret == first.secret
    assert len(first.secret) == 64


def test_nobody_else_may_read_the_secret(tmp_path: Path) -> None:
    ServerState(tmp_path / "state.json")
    assert stat.S_IMODE((tmp_path / "state.json").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"secret": "short", "api_enabled": "no"}', "\xff"])
def test_a_broken_file_gives_fresh_values(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text, encoding="latin-1")
    state = ServerState(tmp_path / "state.json")
    assert state.api_enabled
    assert len(state.secret) == 64
    assert ServerState(tmp_path / "state.json").secret == state.secret


def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = ServerState(tmp_path / "missing" / "state.json")
    state.api_enabled = False
    assert not state.api_enabled
    assert "cannot be written" in caplog.text


def test_without_a_file_nothing_is_remembered() -> None:
    assert ServerState().secret != ServerState().secret
