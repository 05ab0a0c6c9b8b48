"""One generation, from a record to files: the table of contents of a run. Runs in the worker process."""

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from modules.choices import STYLE_EXPANSION
from modules.control import Control
from modules.engine.batches import rows_per_batch, split_into_batches
from modules.engine.censor import blacked_out
from modules.engine.condition import Conditioning, TextConditioner, stack_conditionings
from modules.engine.decode import LinearPreview, NetworkPreview, Preview, TranslatedPreview, decode_latents
from modules.engine.device import DevicePolicy, choose_policy
from modules.engine.drawing import INTERPOSER, Drawing
from modules.engine.embeddings import EmbeddingFolder
from modules.engine.expander import PromptExpander
from modules.engine.journal import DenoisedJournal, discard_journals
from modules.engine.latents import Latents, LatentStatistics, latent_size, statistics_for
from modules.engine.loras import LoraChoice
from modules.engine.memory import return_freed_memory
from modules.engine.runtime import use_deterministic_kernels, use_threads, without_gradients
from modules.engine.sample import SamplingStep
from modules.engine.samplers import SAMPLERS
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tokens import ClipTokenizer
from modules.errors import Interrupted, ModelFileUnusable, UnknownName
from modules.events import Event, Finished, ImageSkipped, Noticed, Planned, Skipped, Stopped, Yielded
from modules.files import HashCache, Kind
from modules.images import preview_jpeg
from modules.plan import ImagePlan, ModelsPlan, Plan, make_plan, plan_models
from modules.progress import ProgressMeter
from modules.record import Record
from modules.request import GenerationRequest, from_params
from modules.resources import Resources
from modules.results import ResultWriter
from modules.settings import Settings
from modules.tools import Toolbox

logger = logging.getLogger(__name__)

PREVIEW_DECODER = "xlvaeapp.pth"
HASHED_KINDS = (Kind.CHECKPOINT, Kind.LORA)  # whose hashes are written into pictures
JOURNALS = ".unfinished"  # below the output folder: what lets a run that was cut short go on


class EngineWorkbench:
    """Everything a worker keeps between tasks: loaded models, encoded prompts, tables."""

    def __init__(self, settings: Settings) -> None:
        """Prepare to work; loads no model yet."""
        self.settings = settings
        self.expander = PromptExpander(settings.paths.expansion)
        self.resources = Resources(settings, expand=self.expander)
        self.policy: DevicePolicy = choose_policy(
            settings.device,
            precision=settings.unet_dtype,
            vae_precision=settings.vae_dtype,
            text_precision=settings.clip_dtype,
            vae_on_cpu=settings.vae_in_cpu,
        )
        self.store = ModelStore(self.policy, memory_limit_mib=settings.max_memory)
        self.conditioner = TextConditioner(
            ClipTokenizer(settings.paths.root / "models" / "tokenizer"),
            embeddings=EmbeddingFolder(settings.paths.embeddings),
        )
        self.hashes = HashCache(settings.paths.hash_cache)
        self.tools = Toolbox(settings.paths)
        self._previews: dict[object, Preview] = {}
        use_threads(settings.always_cpu or 0)
        if settings.deterministic:
            use_deterministic_kernels()

    def warm_up(self) -> None:
        """Load the default model and touch its text encoders, so that the first task does not wait.

        With `--rebuild-hash-cache` the hashes of all models are computed after that.
        """
        try:
            request = GenerationRequest(base_model_name=self.settings.config.default_model)
            model = self.store.base(plan_models(request, self.resources.plan_resources()).checkpoint.path)
            self.conditioner.encode(model, ("",))
        finally:
            if self.settings.rebuild_hash_cache is not None:
                catalogue = self.resources.catalogue
                models = [catalogue.resolve(kind, name) for kind in HASHED_KINDS for name in catalogue.names(kind)]
                self.hashes.rebuild(models, self.settings.rebuild_hash_cache)

    def call(self, tool: str, payload: Mapping[str, Any]) -> str | None:
        """What is no task: "describe" and "generate_mask" of `Toolbox`, and "unload_models".

        Raises:
            EngineFailed: there is no such tool.
            FocaleError: the tool cannot do its work; see `Toolbox`.
        """
        if tool == "unload_models":
            self.store.forget()
            self.tools.forget()
            self.expander.forget()
            self._previews.clear()
            return None
        return self.tools.run(tool, payload)

    def rest(self) -> None:
        """Return the memory that the last pictures were computed in; the models stay."""
        return_freed_memory()

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        """Run one task; its events up to a final one, or `Yielded`."""
        try:
            last: Event | None = None
            for event in TaskRun(self, record, control).events():
                yield event
                last = event
        except Interrupted:
            last = Stopped()
            yield last
        if not isinstance(last, Yielded):
            discard_journals(self.journal_folder, record.task_id)

    @property
    def journal_folder(self) -> Path:
        """Where runs in work keep what lets them go on."""
        return self.settings.paths.outputs / JOURNALS

    def preview_of(self, model: SdxlModel) -> Preview:
        """The best preview there is for a model's latents: a decoder from `vae_approx`, else a linear map."""
        if model.identity not in self._previews:
            self._previews[model.identity] = self._make_preview(model)
        return self._previews[model.identity]

    def _make_preview(self, model: SdxlModel) -> Preview:
        path = self.resources.catalogue.find(Kind.PREVIEW_DECODER, PREVIEW_DECODER)
        if path is not None and model.facts.native_size >= 1024:
            try:
                return NetworkPreview(path)
            except ModelFileUnusable as error:
                logger.warning("%s Previews use a linear map.", error)
        return LinearPreview(model.facts.latent_rgb)


@dataclass
class Seconds:
    """Where the time of a task goes.

    model: inside the networks. total: from the start.
    """

    began: float = field(default_factory=time.perf_counter)
    model: float = 0.0

    @property
    def total(self) -> float:
        """Seconds since the task began."""
        return time.perf_counter() - self.began


class TaskRun:
    """One attempt at one task: plan → condition → latents → sample → decode → save."""

    def __init__(self, bench: EngineWorkbench, record: Record, control: Control) -> None:
        """Prepare an attempt; images that an earlier one settled are left alone."""
        self.bench = bench
        self.record = record
        self.control = control
        self.request = from_params(record.req_params)
        self.meter = ProgressMeter(self.request.image_number)
        self.censors = self.request.black_out_nsfw or bench.settings.config.default_black_out_nsfw
        self.settled = set(record.settled)
        self.pictures: list[Image.Image] = []
        self.seconds = Seconds()
        self.evaluations = 0
        self.plan: Plan
        self.model: SdxlModel
        self.refiner: SdxlModel | None
        self.writer: ResultWriter

    @without_gradients
    def events(self) -> Iterator[Event]:
        """Run to the end."""
        yield self.meter.stage("Loading models ...")
        models = self._load()
        if self.bench.expander.has_model and STYLE_EXPANSION in self.request.style_selections:
            yield self.meter.stage("Preparing Fooocus text #1 ...")
        self._decide(models)
        yield self._planned()
        yield from (Noticed(notice) for notice in self.plan.notices)
        if self.bench.expander.problem and any(image.texts.expansion for image in self.plan.images):
            yield Noticed(self.bench.expander.problem)
        for number, batch in enumerate(self._batches()):
            if self.settled.issuperset(image.index for image in batch):
                continue
            if number and self.control.should_yield:
                yield Yielded()
                return
            yield from self._draw(batch)
        if self.plan.output.grid and (grid := self.writer.save_grid(self.pictures)):
            yield grid
        yield self._end()

    # -- plan ---------------------------------------------------------------------------------------------------

    def _load(self) -> ModelsPlan:
        """Find and load the weights."""
        bench = self.bench
        resources = bench.resources.plan_resources()
        try:
            models = plan_models(self.request, resources)
        except UnknownName:  # the server saw a file that came after this process last looked
            bench.resources.refresh()
            resources = bench.resources.plan_resources()
            models = plan_models(self.request, resources)
        self.model = bench.store.base(models.checkpoint.path)
        self.refiner = bench.store.refiner(models.refiner.path) if models.refiner else None
        return models

    def _decide(self, models: ModelsPlan) -> None:
        """Decide everything else."""
        bench, settings = self.bench, self.bench.settings
        resources = bench.resources.plan_resources()
        self.plan = make_plan(self.request, resources, models=models, native_size_px=self.model.facts.native_size)
        self.meter.plan(self.plan.sampling.steps)
        self.writer = ResultWriter(
            root=settings.paths.outputs,
            request=self.request,
            plan=self.plan,
            hashes=bench.hashes if self.plan.output.metadata else None,
            with_log=not settings.disable_image_log,
            created_by=settings.config.metadata_created_by,
        )

    def _planned(self) -> Planned:
        sampling = self.plan.sampling
        return Planned(
            self.plan.models.checkpoint.name, sampling.width, sampling.height, sampling.steps, len(self.plan.images)
        )

    def _batches(self) -> list[tuple[ImagePlan, ...]]:
        """The pictures in batches that depend on nothing but the request, so that a new attempt splits them alike."""
        sampling = self.plan.sampling
        rows = rows_per_batch(
            *latent_size(sampling.width, sampling.height),
            self.bench.policy.device,
            deterministic=self.bench.settings.deterministic or not SAMPLERS[sampling.sampler].rows_together,
        )
        return split_into_batches(self.plan.images, rows, lambda image: (image.loras, self._token_counts(image)))

    def _token_counts(self, image: ImagePlan) -> tuple[int, int]:
        """How long the embeddings of an image's prompts are; only equal ones share a batch."""
        texts, count = image.texts, self.bench.conditioner.token_count
        return count(texts.positive_texts), count(texts.negative_texts)

    # -- draw ---------------------------------------------------------------------------------------------------

    def _draw(self, batch: tuple[ImagePlan, ...]) -> Iterator[Event]:
        """Draw one batch, from words to files."""
        yield from self._merge_loras(batch[0])
        positive, negative = yield from self._condition(batch)
        pictures = yield from self._sample(batch, positive, negative)
        if pictures is not None:
            yield from self._save(batch, pictures)

    def _merge_loras(self, image: ImagePlan) -> Iterator[Event]:
        """Merge the LoRAs of a batch into the networks; those of the batch before are taken out."""
        choices = [LoraChoice(lora.path, lora.weight) for lora in image.loras]
        for report in self.model.loras.select(choices):
            if report.skipped:
                yield Noticed(f"LoRA {report.name} was made for another model than {self.model.path.name}; left out.")
        if self.refiner is not None:
            self.refiner.loras.select(choices)

    def _condition(
        self, batch: tuple[ImagePlan, ...]
    ) -> Generator[Event, None, tuple[Conditioning, Conditioning | None]]:
        """Encode the prompts of a batch; no negative conditioning where guidance is off."""
        guided = self.plan.sampling.guidance_scale != 1.0
        positives, negatives = [], []
        for image in batch:
            number = image.index + 1
            yield self.meter.stage(f"Encoding positive #{number} ...", image=number)
            began = time.perf_counter()
            positives.append(self._conditioning(image, is_positive=True))
            if guided:
                negatives.append(self._conditioning(image, is_positive=False))
            self.seconds.model += time.perf_counter() - began
        return stack_conditionings(positives), stack_conditionings(negatives) if guided else None

    def _conditioning(self, image: ImagePlan, *, is_positive: bool) -> Conditioning:
        sampling, texts = self.plan.sampling, image.texts
        return self.bench.conditioner.condition(
            self.model,
            texts.positive_texts if is_positive else texts.negative_texts,
            width=sampling.width // 8 * 8,
            height=sampling.height // 8 * 8,
            adm_scaler=sampling.adm.positive if is_positive else sampling.adm.negative,
            clip_skip=self.plan.models.clip_skip,
            pooled_texts=texts.positive_pooled if is_positive else texts.negative_pooled,
        )

    def _sample(
        self, batch: tuple[ImagePlan, ...], positive: Conditioning, negative: Conditioning | None
    ) -> Generator[Event, None, list[Image.Image] | None]:
        """Step through the noise levels and decode; None when every image of the batch was skipped."""
        drawing = Drawing(
            self.model,
            self.plan.sampling,
            positive=positive,
            negative=negative,
            seeds=[image.seed for image in batch],
            refiner=self.refiner,
            interposer=self.bench.resources.catalogue.find(Kind.PREVIEW_DECODER, INTERPOSER),
            check=self.control.check,
        )
        with self._journal(batch, drawing.shape) as journal:
            if journal.replayed:
                yield Noticed(f"Went on after {journal.replayed} model evaluations of an earlier attempt.")
            run = drawing.run(journal)
            try:
                while True:
                    step = next(run)
                    yield from self._drop_skipped(batch, drawing)
                    if self.settled.issuperset(image.index for image in batch):
                        return None
                    yield self._step_progress(step, batch)
            except StopIteration as end:
                return self._decode(drawing.result_model, end.value)
            finally:
                run.close()
                self.seconds.model += drawing.model_seconds
                self.evaluations += drawing.evaluations

    def _journal(self, batch: tuple[ImagePlan, ...], shape: tuple[int, ...]) -> DenoisedJournal:
        """The journal of a batch, with what an earlier attempt at the same task left in it."""
        return DenoisedJournal(
            self.bench.journal_folder / f"{self.record.task_id}-{batch[0].index}.denoised",
            identity=repr((self.record.req_params, batch, self.plan.models, self.model.version)),
            shape=shape,
        )

    def _drop_skipped(self, batch: tuple[ImagePlan, ...], drawing: Drawing) -> Iterator[Event]:
        """Drop the first unfinished image of the batch for each wish to skip; the others go on."""
        for _ in range(self.control.take_skips()):
            left = [image for image in batch if image.index not in self.settled]
            if not left:
                return
            self.settled.add(left[0].index)
            if len(left) > 1:
                drawing.drop(batch.index(left[0]))
            yield ImageSkipped(left[0].index)

    def _step_progress(self, step: SamplingStep, batch: tuple[ImagePlan, ...]) -> Event:
        """Progress with a preview of the first image that is still wanted."""
        row = next(row for row, image in enumerate(batch) if image.index not in self.settled)
        preview, statistics = self.bench.preview_of(self.model), self._statistics(self.model)
        if statistics != self.model.statistics:
            preview = TranslatedPreview(preview, known=self.model.statistics, shown=statistics)
        jpeg = preview_jpeg(preview(step.denoised[row])) if self.plan.previews and not self.censors else None
        return self.meter.sampling(step.index + 1, image=batch[0].index + 1, batch=len(batch), preview=jpeg)

    def _statistics(self, model: SdxlModel) -> LatentStatistics:
        """The model space of this run's latents: the scheduler of Playground has one of its own."""
        return statistics_for(self.plan.sampling.scheduler, model.facts.scaling_factor)

    def _decode(self, model: SdxlModel, latents: Latents) -> list[Image.Image]:
        """Latents to pictures, with the checkpoint's VAE or the one that was asked for."""
        chosen = self.plan.models.vae
        vae = self.bench.store.vae(chosen.path, scaling_factor=model.facts.scaling_factor) if chosen else model.vae
        began = time.perf_counter()
        pictures = decode_latents(vae, latents, statistics=self._statistics(model))
        self.seconds.model += time.perf_counter() - began
        return pictures

    # -- save ---------------------------------------------------------------------------------------------------

    def _save(self, batch: tuple[ImagePlan, ...], pictures: list[Image.Image]) -> Iterator[Event]:
        """Write the pictures that are still wanted."""
        pictures = yield from self._censored(batch, pictures)
        count = len(self.plan.images)
        for image, picture in zip(batch, pictures, strict=True):
            if image.index in self.settled:
                continue
            self.control.check()
            number = image.index + 1
            yield self.meter.stage(f"Saving image {number}/{count} to system ...", image=number)
            self.pictures.append(picture)
            self.settled.add(image.index)
            yield self.writer.save(picture, image)

    def _censored(
        self, batch: tuple[ImagePlan, ...], pictures: list[Image.Image]
    ) -> Generator[Event, None, list[Image.Image]]:
        """The pictures, with black ones for the unsafe where that is wanted."""
        if not self.censors:
            return pictures
        kept = []
        for image, picture, is_unsafe in zip(batch, pictures, self.bench.tools.find_unsafe(pictures), strict=True):
            kept.append(blacked_out(picture) if is_unsafe else picture)
            if is_unsafe and image.index not in self.settled:
                yield Noticed(f"Image {image.index + 1} was found unsafe and is blacked out.")
        return kept

    def _end(self) -> Finished | Skipped:
        """Finished, or skipped when no picture came out of any attempt."""
        if not self.pictures and not self.record.result:
            return Skipped()
        return Finished(self.seconds.model, self.seconds.total, self.evaluations)
