"""Stand-ins for tests: an engine that draws coloured pictures at once, and stops exactly where a test wants it to."""

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from modules.control import Action
from modules.errors import EngineFailed, FocaleError, WorkerDied
from modules.events import (
    Event,
    Failed,
    Finished,
    ImageSaved,
    ImageSkipped,
    Progress,
    Skipped,
    Stopped,
    Yielded,
)
from modules.params import parse_size
from modules.record import Record
from modules.request import GenerationRequest, from_params
from modules.save import save_image

STEPS = 4


def fake_picture(prompt: str, seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture that follows from prompt and seed alone: two colours, one on each half."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    image = Image.new("RGB", size, tuple(digest[:3]))
    image.paste(tuple(digest[3:6]), (0, 0, size[0] // 2, size[1]))
    return image


class FakeEngine:
    """Implements `jobs.Engine` and `handlers.Tools` in the loop itself.

    runs: records it was given. steps: per picture. size: of the pictures; None takes a sixteenth of the asked one.
    deaths: how many further runs lose their worker. failure: what the next runs fail with.
    answers: tool name → answer or error. calls: the tool calls it got.
    held: set while a run waits for `release`.
    """

    def __init__(self, output_root: Path, *, steps: int = STEPS, size: tuple[int, int] | None = None) -> None:
        self.output_root = output_root
        self.steps = steps
        self.size = size
        self.runs: list[Record] = []
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        self.answers: dict[str, object] = {}
        self.deaths = 0
        self.failure: Failed | Exception | None = None
        self.closed = False
        self.held = asyncio.Event()
        self._hold_at: int | None = None
        self._wake = asyncio.Event()
        self._wishes: dict[str, list[Action]] = {}

    def hold(self, at_step: int = 1) -> None:
        """Make runs wait before this step of every picture."""
        self._hold_at = at_step
        self.held.clear()

    def release(self) -> None:
        """Let runs go on."""
        self._hold_at = None
        self._wake.set()

    def begin(self) -> None:
        """Nothing to begin."""

    async def start(self) -> None:
        """Nothing to start."""

    def control(self, task_id: str, action: Action) -> None:
        """Note a wish, and wake a held run."""
        self._wishes.setdefault(task_id, []).append(action)
        self._wake.set()

    async def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True

    async def call(self, tool: str, payload: Mapping[str, Any]) -> Any:
        """The prepared answer of a tool."""
        self.calls.append((tool, payload))
        answer = self.answers.get(tool, EngineFailed(f"no tool {tool}"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run(self, record: Record) -> AsyncIterator[Event]:
        """Draw the pictures of a request, one after the other."""
        self.runs.append(record)
        request = from_params(record.req_params)
        yield Progress(1, "Processing prompts ...", images=request.image_number)
        if isinstance(self.failure, Failed):
            yield self.failure
            return
        if isinstance(self.failure, Exception):
            raise self.failure
        made = len(record.result)
        for index in range(request.image_number):
            if index in record.settled:
                continue
            async for event in self._draw(record.task_id, request, index):
                made += isinstance(event, ImageSaved)
                yield event
                if isinstance(event, Stopped | Yielded):
                    return
        yield Finished(0.0, 0.0) if made else Skipped()

    async def _draw(self, task_id: str, request: GenerationRequest, index: int) -> AsyncIterator[Event]:
        wishes = self._wishes.setdefault(task_id, [])
        if "yield" in wishes and index:
            wishes.remove("yield")
            yield Yielded()
            return
        seed = request.image_seed + (0 if request.disable_seed_increment else index)
        picture = fake_picture(request.prompt, seed, self._size(request))
        for step in range(1, self.steps + 1):
            await self._pause(step, wishes)
            if self.deaths:
                self.deaths -= 1
                raise WorkerDied("the fake worker ended unexpectedly (exit code -9)")
            if "stop" in wishes:
                yield Stopped()
                return
            if "skip" in wishes:
                wishes.remove("skip")
                yield ImageSkipped(index)
                return
            yield self._progress(request, index, step, picture)
        yield self._saved(request, index, seed, picture)

    async def _pause(self, step: int, wishes: list[Action]) -> None:
        """Give the loop a turn, and wait while the test holds this step."""
        await asyncio.sleep(0)
        while self._hold_at is not None and step >= self._hold_at and not wishes and not self.deaths:
            self._wake.clear()
            self.held.set()
            await self._wake.wait()

    def _size(self, request: GenerationRequest) -> tuple[int, int]:
        width, height = parse_size(request.aspect_ratios_selection)
        return self.size or (width // 16, height // 16)

    def _progress(self, request: GenerationRequest, index: int, step: int, picture: Image.Image) -> Progress:
        images = request.image_number
        share = (index * self.steps + step) / (self.steps * images)
        preview = None if request.disable_preview else _jpeg(picture)
        text = f"Sampling step {step}/{self.steps}, image {index + 1}/{images} ..."
        return Progress(int(1 + 98 * share), text, preview, step, self.steps, index + 1, images)

    def _saved(self, request: GenerationRequest, index: int, seed: int, picture: Image.Image) -> ImageSaved:
        saved = save_image(
            picture,
            root=self.output_root,
            output_format=request.output_format,
            now=datetime.now(),
            index=index,
            save_name=request.save_name,
        )
        return ImageSaved(saved.path, index, seed, saved.width, saved.height)


def _jpeg(picture: Image.Image) -> bytes:
    small = picture.resize((max(1, picture.width // 4), max(1, picture.height // 4)))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG")
    return buffer.getvalue()


def png_base64(colour: str = "red", size: tuple[int, int] = (32, 24)) -> str:
    """A small picture as a request may carry it."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class NoCheck:
    """A request check that refuses what a test tells it to."""

    def __init__(self) -> None:
        self.refusal: FocaleError | None = None

    def __call__(self, request: GenerationRequest) -> None:
        """Refuse, or not."""
        if self.refusal:
            raise self.refusal
