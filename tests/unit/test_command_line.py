"""`generate` on the command line: a preset's missing files come first, with the same progress as everywhere."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.command_line import _generate, _with_defaults
from modules.record import Record
from modules.request import GenerationRequest, to_params
from modules.settings import Settings
from tests.model_server import ModelServer, model_bytes, model_server
from tests.rest.conftest import ROOT, make_services

ANIME = "animaPencilXL_v500.safetensors"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def models() -> Iterator[ModelServer]:
    with model_server() as running:
        yield running


async def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[int, str, list[str]]:
    """Exit code, what the terminal got, and the prompts that were drawn."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    settings = Settings.load(["--temp-path", str(tmp_path / "temp"), *flags], env={}, root=tmp_path)
    settings.prepare()
    services, engine, _check, history = make_services(settings)
    history.add(Record(task_id="a" * 32, req_params=to_params(GenerationRequest(prompt="the server's"))))
    request = _with_defaults(GenerationRequest(prompt="a fox", image_number=1), settings)
    code = await _generate(services, request, tmp_path / "fox.png")
    monkeypatch.undo()
    return code, terminal.getvalue(), [record.req_params["prompt"] for record in engine.runs]


async def test_a_preset_fetches_its_files_with_progress_and_no_other_task_runs(
    models: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.add(f"mashb1t/fav_models/resolve/main/fav/{ANIME}", model_bytes())
    code, said, drawn = await run(tmp_path, monkeypatch, "--preset", "anime", "--hf-mirror", models.url)
    assert code == 0
    assert f"Downloading {ANIME}" in said
    assert f"Downloaded {ANIME}" in said
    assert said.index("Downloading") < said.index("Sampling step 1/4")
    assert drawn == ["a fox"]
    assert (tmp_path / "fox.png").is_file()


async def test_without_a_preset_nothing_is_fetched(
    models: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _said, drawn = await run(tmp_path, monkeypatch, "--hf-mirror", models.url)
    assert (code, drawn, models.asked) == (0, ["a fox"], [])


async def test_a_failed_download_is_the_answer(
    models: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said, drawn = await run(tmp_path, monkeypatch, "--preset", "anime", "--hf-mirror", models.url)
    assert (code, drawn) == (1, [])
    assert f"{ANIME} could not be downloaded from {models.url}" in said
