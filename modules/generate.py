"""One generation, from a request to files: the table of contents of a run. Runs in the worker process."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from modules.control import Control
from modules.engine.batches import split_into_batches
from modules.engine.condition import Conditioning, TextConditioner, stack_conditionings
from modules.engine.decode import LinearPreview, NetworkPreview, Preview, decode_latents
from modules.engine.device import choose_policy
from modules.engine.embeddings import EmbeddingFolder
from modules.engine.sample import SamplingRun, sample
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tokens import ClipTokenizer
from modules.errors import EngineFailed, Interrupted, ModelFileUnusable
from modules.events import (
    Event,
    Finished,
    ImageSkipped,
    Noticed,
    Planned,
    Progress,
    Skipped,
    Stopped,
    Yielded,
)
from modules.files import HashCache, Kind
from modules.images import preview_jpeg
from modules.plan import EMBEDDED_MODEL, ImagePlan, ModelsPlan, Plan, make_plan, plan_models
from modules.progress import ProgressMeter
from modules.record import Record
from modules.request import GenerationRequest, from_params
from modules.resources import Resources
from modules.results import ResultWriter
from modules.settings import Settings

logger = logging.getLogger(__name__)

PREVIEW_DECODER = "xlvaeapp.pth"


@dataclass
class Stopwatch:
    """Seconds a task took, and how many of them the networks took."""

    began: float
    model_seconds: float = 0.0


class EngineWorkbench:
    """Everything a worker keeps between tasks: loaded models, encoded prompts, tables."""

    def __init__(self, settings: Settings) -> None:
        """Prepare to work; loads no model yet."""
        self._settings = settings
        self._resources = Resources(settings)
        self._policy = choose_policy(
            settings.device, precision=settings.unet_dtype, vae_precision=settings.vae_dtype
        )
        self._store = ModelStore(self._policy, memory_limit_mib=settings.max_memory)
        self._conditioner = TextConditioner(
            ClipTokenizer(settings.paths.root / "models" / "tokenizer"),
            embeddings=EmbeddingFolder(settings.paths.embeddings),
        )
        self._hashes = HashCache(settings.paths.hash_cache)
        self._previews: dict[object, Preview] = {}
        if settings.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def warm_up(self) -> None:
        """Load the default model and run it once at a small size, so that the first task does not wait."""
        request = GenerationRequest(base_model_name=self._settings.config.default_model)
        model = self._store.base(plan_models(request, self._resources.plan_resources()).checkpoint.path)
        with torch.inference_mode():
            self._conditioner.encode(model, ("",))

    def call(self, tool: str, payload: Mapping[str, Any]) -> Any:
        """Tools that are no task; none is built in yet.

        Raises:
            EngineFailed: there is no such tool.
        """
        raise EngineFailed(f"This version has no tool called {tool!r}.")

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        """Run one task: plan, draw batch after batch, end."""
        request = from_params(record.req_params)
        watch = Stopwatch(time.perf_counter())
        meter = ProgressMeter(request.image_number)
        try:
            yield from self._run(request, record, control, watch, meter)
        except Interrupted:
            yield Stopped()

    @torch.inference_mode()
    def _run(
        self,
        request: GenerationRequest,
        record: Record,
        control: Control,
        watch: Stopwatch,
        meter: ProgressMeter,
    ) -> Iterator[Event]:
        yield meter.stage("Loading models ...")
        resources = self._resources.plan_resources()
        models = plan_models(request, resources)
        model = self._load(models)
        plan = make_plan(request, resources, models=models, native_size_px=model.facts.native_size)
        settled = set(record.settled)
        meter.plan(plan.sampling.steps)
        yield self._planned(plan)
        yield from (Noticed(notice) for notice in plan.notices)
        writer = self._writer(request, plan)
        pictures: list[Image.Image] = []
        for number, batch in enumerate(self._batches(plan)):
            if settled.issuperset(image.index for image in batch):
                continue
            if number and control.should_yield:
                yield Yielded()
                return
            yield from self._draw(batch, plan, model, control, watch, meter, writer, settled, pictures)
        if plan.output.grid and (grid := writer.save_grid(pictures)):
            yield grid
        yield self._end(record, pictures, watch)

    def _draw(
        self,
        batch: tuple[ImagePlan, ...],
        plan: Plan,
        model: SdxlModel,
        control: Control,
        watch: Stopwatch,
        meter: ProgressMeter,
        writer: ResultWriter,
        settled: set[int],
        pictures: list[Image.Image],
    ) -> Iterator[Event]:
        """Draw one batch: condition → sample → decode → save."""
        with ExitStack() as patches:
            self._merge_loras(batch[0], model, patches)
            positive, negative = yield from self._condition(batch, plan, model, meter)
            run = sample(
                model,
                plan.sampling,
                positive=positive,
                negative=negative,
                seeds=[image.seed for image in batch],
                check=control.check_stop,
            )
            latents = yield from self._sample(run, batch, plan, model, control, meter, settled)
        watch.model_seconds += run.model_seconds
        if latents is None:
            return
        vae = self._vae(plan.models, model)
        began = time.perf_counter()
        images = decode_latents(vae, latents, statistics=model.statistics)
        watch.model_seconds += time.perf_counter() - began
        for image, picture in zip(batch, images, strict=True):
            if image.index in settled:
                continue
            control.check_stop()
            yield meter.stage(f"Saving image {image.index + 1}/{len(plan.images)} to system ...", image=image.index + 1)
            pictures.append(picture)
            settled.add(image.index)
            yield writer.save(picture, image)

    def _sample(
        self,
        run: SamplingRun,
        batch: tuple[ImagePlan, ...],
        plan: Plan,
        model: SdxlModel,
        control: Control,
        meter: ProgressMeter,
        settled: set[int],
    ) -> "Iterator[Event]":
        """Step through the noise levels, telling of each step; the latents, or None when every image was skipped."""
        preview = self._preview(model)
        for step in run:
            for _ in range(control.take_skips()):
                dropped = next((image for image in batch if image.index not in settled), None)
                if dropped is not None:
                    settled.add(dropped.index)
                    yield ImageSkipped(dropped.index)
            shown = next((row for row, image in enumerate(batch) if image.index not in settled), None)
            if shown is None:
                run.close()
                return None
            jpeg = preview_jpeg(preview(step.denoised[shown])) if plan.previews else None
            yield meter.sampling(step.index + 1, image=batch[0].index + 1, batch=len(batch), preview=jpeg)
        return run.latents
