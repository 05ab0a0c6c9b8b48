"""Times a step of the embedded model's UNet with and without packed convolution weights.

    python -m benchmarks.packed_convolutions

Both in turn on the same network, prompt and negative prompt together at 128 px; prints the shortest of each and their
ratio.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from modules.engine.condition import TextConditioner
from modules.engine.device import choose_policy
from modules.engine.latents import LATENT_CHANNELS, latent_size
from modules.engine.packed_convolutions import PackedConvolutions
from modules.engine.store import ModelStore
from modules.engine.text_projections import TextProjections
from modules.engine.tokens import ClipTokenizer

MODELS = Path(__file__).parents[1] / "models"
SIZE_PX = 128


@torch.inference_mode()
def step_ms(rounds: int) -> tuple[float, float]:
    """Milliseconds of the fastest step: plain, packed."""
    model = ModelStore(choose_policy("cpu", precision="fp32")).base(MODELS / "embedded" / "focale-tiny.safetensors")
    conditioner = TextConditioner(ClipTokenizer(MODELS / "tokenizer"))
    text = conditioner.condition(model, ("a red apple",), width=SIZE_PX, height=SIZE_PX, adm_scaler=1.0).expand(2)
    latents = torch.randn(2, LATENT_CHANNELS, *latent_size(SIZE_PX, SIZE_PX))
    added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": text.time_ids}
    projections = TextProjections(model.unet)
    ways = (nullcontext, PackedConvolutions(model.unet).in_use)
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for place, way in enumerate(ways):
            with projections.in_use(text.prompt_embeds), way():
                began = time.perf_counter()
                model.unet(latents, torch.tensor(500.0), text.prompt_embeds, added_cond_kwargs=added)
                best[place] = min(best[place], 1000 * (time.perf_counter() - began))
    return best[0], best[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    plain, packed = step_ms(parser.parse_args().rounds)
    print(f"plain {plain:.1f} ms, packed {packed:.1f} ms, packed ÷ plain {packed / plain:.2f}")


if __name__ == "__main__":
    main()
