"""One batch from noise to clean latents: networks, guidance, schedule, sampler and refiner, put together by a plan."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from modules.choices import RefinerSwapMethod
from modules.engine.coarse_to_fine import CoarseToFine
from modules.engine.condition import Conditioning, refiner_conditioning, resized
from modules.engine.denoiser import Denoiser
from modules.engine.freeu import freeu
from modules.engine.guidance import Guidance
from modules.engine.journal import DenoisedJournal
from modules.engine.latents import LATENT_CHANNELS, LATENT_SCALE, Latents, latent_size
from modules.engine.noise import RowNoise
from modules.engine.refiner import ModelUse, Refiner, interposed, load_interposer, models_for_sd15
from modules.engine.sample import SamplingRun, sample
from modules.engine.sigmas import ModelSampling, model_sampling_for
from modules.engine.store import SdxlModel
from modules.engine.weights import Architecture
from modules.errors import ModelFileMissing
from modules.plan import SamplingPlan

INTERPOSER = "xl-to-v1_interposer-v4.0.safetensors"


class Drawing:
    """The sampling of B images that share a plan.

    result_model: the model whose VAE decodes the latents.
    """

    def __init__(
        self,
        base: SdxlModel,
        plan: SamplingPlan,
        *,
        positive: Conditioning,
        negative: Conditioning | None,
        seeds: Sequence[int],
        refiner: SdxlModel | None = None,
        interposer: Path | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Put the parts together; nothing is computed yet.

        Args:
            positive, negative: conditioning of the B images; negative may be None where guidance is 1.
            seeds: one per image.
            refiner: second model, for the steps from `plan.refiner_switch_step` on.
            interposer: file of the network from SDXL's latents to Stable Diffusion 1.5's.
            check: called before every model evaluation; may raise to end the run.
        Raises:
            ModelFileMissing: a Stable Diffusion 1.5 refiner needs the interposer and there is none.
        """
        self._base = base
        self._plan = plan
        self._seeds = tuple(seeds)
        self._check = check
        self._patches = ExitStack()
        self._model_sampling = self._sampling_of(base)
        self._denoisers: list[Denoiser | CoarseToFine] = [self._base_denoiser(positive, negative)]
        self._refiner = None
        self.result_model = base
        if refiner is not None and plan.refiner_switch_step < plan.steps:
            self._refiner = self._take_refiner(refiner, positive, negative, interposer)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, 4, h, w)."""
        return (len(self._seeds), LATENT_CHANNELS, *latent_size(self._plan.width, self._plan.height))

    @property
    def model_seconds(self) -> float:
        """Seconds spent inside the networks so far."""
        return sum(denoiser.model_seconds for denoiser in self._denoisers)

    @property
    def evaluations(self) -> int:
        """Model evaluations so far."""
        return sum(denoiser.evaluations for denoiser in self._denoisers)

    def run(self, journal: DenoisedJournal) -> SamplingRun:
        """Step through the noise levels; yields after each step's first evaluation, returns the clean latents."""
        plan, base = self._plan, self._denoisers[0]
        noise = RowNoise(self._seeds, self.shape[1:], self._base.unet.device)
        try:
            if plan.freeu is not None:
                self._patches.enter_context(freeu(self._base.unet, plan.freeu))
            latents: Latents = yield from sample(
                journal.wrap(base),
                noise,
                sampler=plan.sampler,
                scheduler=plan.scheduler,
                steps=plan.steps,
                strength=plan.strength,
                model_sampling=self._model_sampling,
                refiner=self._bound_refiner(journal),
            )
            return latents
        finally:
            self._patches.close()

    def drop(self, row: int) -> None:
        """Compute the image of this row no further; the others do not notice."""
        for denoiser in self._denoisers:
            denoiser.drop(row)

    def _sampling_of(self, model: SdxlModel) -> ModelSampling:
        return model_sampling_for(self._plan.scheduler, model.facts.prediction)

    def _base_denoiser(self, positive: Conditioning, negative: Conditioning | None) -> Denoiser | CoarseToFine:
        plan, factor = self._plan, self._plan.coarse_factor
        if factor == 1:
            return self._denoiser(self._base, positive, negative)
        width, height = plan.width // factor, plan.height // factor
        coarse = self._denoiser(
            self._base,
            resized(positive, width=width, height=height, adm_scaler=plan.adm.positive),
            resized(negative, width=width, height=height, adm_scaler=plan.adm.negative) if negative else None,
        )
        return CoarseToFine(coarse, self._denoiser(self._base, positive, None, Guidance(1.0)), factor)

    def _denoiser(
        self,
        model: SdxlModel,
        positive: Conditioning,
        negative: Conditioning | None,
        guidance: Guidance | None = None,
    ) -> Denoiser:
        """One model's evaluation; `guidance` in place of the plan's."""
        plan = self._plan
        return Denoiser(
            model.unet,
            self._sampling_of(model),
            positive,
            negative,
            guidance or Guidance(plan.guidance_scale, plan.adaptive_guidance_scale, plan.sharpness),
            adm_end=plan.adm.end,
            check=self._check,
        )

    def _take_refiner(
        self, refiner: SdxlModel, positive: Conditioning, negative: Conditioning | None, interposer: Path | None
    ) -> Refiner:
        """The second stage: its denoiser, and how latents cross over."""
        rows, columns = self.shape[-2:]
        convert = partial(
            refiner_conditioning,
            base=self._base,
            refiner=refiner,
            width=columns * LATENT_SCALE,
            height=rows * LATENT_SCALE,
        )
        denoiser = self._denoiser(
            refiner, convert(positive, positive=True), convert(negative, positive=False) if negative else None
        )
        self._denoisers.append(denoiser)
        method = self._plan.refiner_swap_method
        if refiner.facts.architecture is Architecture.SD15:
            return self._sd15(refiner, denoiser, interposer)
        if method is not RefinerSwapMethod.JOINT:
            self.result_model = refiner
        return Refiner(denoiser, self._plan.refiner_switch_step, method, on_switch=self._patches.close)

    def _sd15(self, refiner: SdxlModel, denoiser: Denoiser, interposer: Path | None) -> Refiner:
        """A Stable Diffusion 1.5 refiner works on latents of its own kind, so clean latents are converted."""
        use = models_for_sd15(self._plan.steps, self._plan.refiner_switch_step, self._plan.strength)
        if use is not ModelUse.BOTH:
            raise ValueError(
                f"A run of strength {self._plan.strength} does not change to a Stable Diffusion 1.5 refiner."
            )
        if interposer is None:
            raise ModelFileMissing(
                f"A Stable Diffusion 1.5 refiner needs {INTERPOSER} in models/vae_approx; put it there, "
                "or choose an SDXL refiner or none."
            )
        self.result_model = refiner
        convert = interposed(load_interposer(interposer), self._base.statistics, refiner.statistics)
        return Refiner(
            denoiser,
            self._plan.refiner_switch_step,
            RefinerSwapMethod.VAE,
            convert=convert,
            on_switch=self._patches.close,
        )

    def _bound_refiner(self, journal: DenoisedJournal) -> Refiner | None:
        """The refiner with its estimates in the same journal as the base's."""
        if self._refiner is None:
            return None
        refiner = self._refiner
        return Refiner(
            journal.wrap(refiner.denoise), refiner.switch_step, refiner.method, refiner.convert, refiner.on_switch
        )
