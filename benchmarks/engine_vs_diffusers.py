"""Times our engine beside diffusers' StableDiffusionXLPipeline on the very same networks.

    python -m benchmarks.engine_vs_diffusers                   the embedded model, 1 and 4 images
    python -m benchmarks.engine_vs_diffusers --rounds 9 --steps 30 --size 128

Both get the same prompt, steps, size, guidance and number format, encode the prompt anew and decode; rounds alternate.
Prints the median seconds of each, their ratios, and how alike the pictures are (diffusers interpolates timesteps, we
take the nearest as Fooocus does). Exits with 1 when a budget is missed: one image, and four together, ≤ 1.00 of
diffusers' time; 4 images in one request ≤ 0.80 of 4 times one image on this device, which gains from batching.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image
from transformers import CLIPTokenizer

from modules.engine.condition import TextConditioner
from modules.engine.decode import decode_latents
from modules.engine.denoiser import Denoiser
from modules.engine.device import choose_policy
from modules.engine.guidance import Guidance
from modules.engine.latents import LATENT_CHANNELS, latent_size
from modules.engine.noise import RowNoise
from modules.engine.sample import sample
from modules.engine.sigmas import model_sampling_for
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tokens import ClipTokenizer

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "models" / "tokenizer"
PROMPT = "a red apple, 3d style"
BARS = {"ours ÷ diffusers": 1.00, "4 together ÷ 4 × 1": 0.80}
Draw = Callable[[], list[Image.Image]]


def diffusers_pipeline(model: SdxlModel) -> StableDiffusionXLPipeline:
    """diffusers' pipeline around the networks of a loaded model; the empty prompt is encoded, as ours is."""
    files = {"vocab": str(TOKENIZER / "vocab.json"), "merges": str(TOKENIZER / "merges.txt")}
    pipeline = StableDiffusionXLPipeline(
        vae=model.vae,
        text_encoder=model.clip_l,
        text_encoder_2=model.clip_g,
        tokenizer=CLIPTokenizer(**files, model_max_length=77),
        tokenizer_2=CLIPTokenizer(**files, model_max_length=77, pad_token="!"),
        unet=model.unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            use_karras_sigmas=True,
            timestep_spacing="linspace",
        ),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_with_diffusers(
    pipeline: StableDiffusionXLPipeline,
    images: int,
    steps: int,
    size: int,
    *,
    guidance_scale: float = 7.0,
) -> list[Image.Image]:
    """The pictures of seeds 0, 1, … by diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    return list(
        pipeline(
            PROMPT,
            negative_prompt="",
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=images,
            generator=generators,
        ).images
    )


@torch.inference_mode()
def draw_with_ours(
    model: SdxlModel,
    tokenizer: ClipTokenizer,
    images: int,
    steps: int,
    size: int,
    *,
    guidance_scale: float = 7.0,
) -> list[Image.Image]:
    """The pictures of seeds 0, 1, … by our engine, the prompts encoded anew."""
    conditioner = TextConditioner(tokenizer)
    guidance = Guidance(guidance_scale)
    positive, *negative = (
        conditioner.condition(model, (text,), width=size, height=size, adm_scaler=1.0).expand(images)
        for text in ((PROMPT,) if guidance.is_neutral else (PROMPT, ""))
    )
    sampling = model_sampling_for("karras", model.facts.prediction)
    denoiser = Denoiser(model.unet, sampling, positive, negative[0] if negative else None, guidance, adm_end=0.0)
    shape = (LATENT_CHANNELS, *latent_size(size, size))
    noise = RowNoise(list(range(images)), shape, model.unet.device)
    run = sample(denoiser, noise, sampler="euler", scheduler="karras", steps=steps, model_sampling=sampling)
    try:
        while True:
            next(run)
    except StopIteration as end:
        return decode_latents(model.vae, end.value, statistics=model.statistics)


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds: seconds of each, and the ratio of each round's pair by the clock and by the CPU."""

    ours_s: float
    theirs_s: float
    ratio: float
    cpu_ratio: float


def compare(ours: Draw, theirs: Draw, rounds: int) -> Comparison:
    """Times both in turn; a first round that warms up does not count."""
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
    return Comparison(
        statistics.median(mine[0] for mine, _ in times),
        statistics.median(other[0] for _, other in times),
        statistics.median(mine[0] / other[0] for mine, other in times),
        statistics.median(mine[1] / other[1] for mine, other in times),
    )


def seconds(draw: Draw) -> tuple[float, float]:
    """How long a call takes by the clock, and by the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    draw()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Reads the command line, measures, prints, and judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "embedded" / "focale-tiny.safetensors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    options = parser.parse_args()

    model = ModelStore(choose_policy("cpu", precision=options.precision)).base(options.model)
    tokenizer = ClipTokenizer(TOKENIZER)
    pipeline = diffusers_pipeline(model)
    results = {
        images: compare(
            partial(draw_with_ours, model, tokenizer, images, options.steps, options.size),
            partial(draw_with_diffusers, pipeline, images, options.steps, options.size),
            options.rounds,
        )
        for images in (1, 4)
    }
    sys.stdout.write(
        f"{options.model.name}, {options.size}×{options.size}, {options.steps} steps Euler, "
        f"{model.unet.dtype}, {torch.get_num_threads()} threads, median of {options.rounds}\n"
    )
    for images, result in results.items():
        sys.stdout.write(
            f"{images} image(s): ours {result.ours_s:.3f} s, diffusers {result.theirs_s:.3f} s, "
            f"ratio {result.ratio:.3f} (of CPU seconds {result.cpu_ratio:.3f})\n"
        )
    mine, other = (
        np.asarray(draw[0], dtype=np.float64)
        for draw in (
            draw_with_ours(model, tokenizer, 1, options.steps, options.size),
            draw_with_diffusers(pipeline, 1, options.steps, options.size),
        )
    )
    error = float(np.square(mine - other).mean())
    sys.stdout.write(f"PSNR of our picture against diffusers': {10 * np.log10(255**2 / max(error, 1e-9)):.1f} dB\n")
    batching = results[4].ours_s / (4 * results[1].ours_s)
    sys.stdout.write(f"4 images in one request ÷ 4 × one image: {batching:.3f}\n")
    slower = max(result.ratio for result in results.values()) > BARS["ours ÷ diffusers"]
    sys.exit(1 if slower or batching > BARS["4 together ÷ 4 × 1"] else 0)


if __name__ == "__main__":
    main()
