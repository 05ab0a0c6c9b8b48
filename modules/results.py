"""Hands a finished picture to the disk: file, embedded parameters, log page."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from PIL import Image

from modules.choices import DEFAULT_VAE, NO_MODEL
from modules.events import ImageSaved
from modules.files import HashCache
from modules.image_grid import contact_sheet
from modules.log_page import LogEntry, add_entry
from modules.metadata import LoraFact, RunFacts, clipboard_values, rows
from modules.metadata_files import Embedding
from modules.plan import ImagePlan, Plan
from modules.request import GenerationRequest, to_params
from modules.save import SavedImage, save_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResultWriter:
    """Writes the pictures of one task.

    root: the output folder. with_log: keep a log page per day.
    hashes: SHA-256 of model files; None leaves the hashes out.
    """

    root: Path
    request: GenerationRequest
    plan: Plan
    hashes: HashCache | None
    with_log: bool = True
    created_by: str = ""
    clock: Callable[[], datetime] = datetime.now

    def save(self, picture: Image.Image, image: ImagePlan) -> ImageSaved:
        """Write one picture with what made it.

        Raises:
            StorageFull: the disk is full or the folder cannot be written.
        """
        facts = self._facts(image)
        scheme = self.plan.output.metadata
        saved = self._write(picture, index=image.index, embedding=Embedding(facts, scheme) if scheme else None)
        if self.with_log:
            add_entry(
                saved.file.parent,
                LogEntry(
                    file_name=saved.file.name,
                    rows=rows(facts, scheme),
                    full_prompt=facts.full_prompt,
                    full_negative_prompt=facts.full_negative_prompt,
                    clipboard=clipboard_values(facts, scheme),
                ),
            )
        return ImageSaved(saved.path, image.index, image.seed, saved.width, saved.height)

    def save_grid(self, pictures: list[Image.Image]) -> ImageSaved | None:
        """Write a contact sheet of all pictures; None when there are fewer than two."""
        sheet = contact_sheet(pictures)
        if sheet is None:
            return None
        saved = self._write(sheet, index=len(self.plan.images), embedding=None)
        return ImageSaved(saved.path, -1, self.request.image_seed, saved.width, saved.height)

    def _write(self, picture: Image.Image, *, index: int, embedding: Embedding | None) -> SavedImage:
        output = self.plan.output
        return save_image(
            picture,
            root=self.root,
            output_format=output.format,
            now=self.clock(),
            index=index,
            save_name=output.save_name,
            embedding=embedding,
        )

    def _facts(self, image: ImagePlan) -> RunFacts:
        models, sampling, texts = self.plan.models, self.plan.sampling, image.texts
        freeu = sampling.freeu
        return RunFacts(
            prompt=texts.prompt,
            negative_prompt=texts.negative_prompt,
            prompt_expansion=texts.expansion,
            styles=texts.styles,
            performance=self.plan.performance.value,
            steps=sampling.steps,
            width=sampling.width,
            height=sampling.height,
            guidance_scale=sampling.guidance_scale,
            sharpness=sampling.sharpness,
            adm_guidance=(sampling.adm.positive, sampling.adm.negative, sampling.adm.end),
            base_model=models.checkpoint.name,
            sampler=sampling.sampler.value,
            scheduler=sampling.scheduler.value,
            seed=image.seed,
            refiner_switch=self.request.refiner_switch,
            base_model_hash=self._hash(models.checkpoint.path),
            refiner_model=models.refiner.name if models.refiner else NO_MODEL,
            refiner_model_hash=self._hash(models.refiner.path) if models.refiner else "",
            overwrite_switch=self.request.overwrite_switch,
            refiner_swap_method=sampling.refiner_swap_method.value,
            adaptive_cfg=sampling.adaptive_guidance_scale,
            clip_skip=models.clip_skip,
            vae=models.vae.name if models.vae else DEFAULT_VAE,
            freeu=(freeu.b1, freeu.b2, freeu.s1, freeu.s2) if freeu else None,
            loras=tuple(LoraFact(lora.name, lora.weight, self._hash(lora.path)) for lora in image.loras),
            full_prompt=texts.positive_texts,
            full_negative_prompt=texts.negative_texts,
            created_by=self.created_by,
            request=to_params(self.request.changed(webhook_url="")),  # files are shared; a hook may hold a secret
        )

    def _hash(self, path: Path) -> str:
        return self.hashes.short(path) if self.hashes else ""
