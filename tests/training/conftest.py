"""Art made up on the spot, so that the trainer's tests fetch nothing and need no more than its requirements."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from training.art import (
    HELD_OUT_STYLE,
    RECOGNITION_STYLES,
    TRAINING_STYLES,
    ArtSet,
    Concept,
    Style,
    load_art,
    write_art,
)
from training.latents import encode_pictures, save_cache
from training.nets import new_vae
from training.stages import StateFolder

ROOT = Path(__file__).parents[2]
VOCABULARY = ROOT / "models" / "tokenizer"
TABLES = ROOT / "models" / "embedded" / "focale-tiny-00001-of-00002.safetensors"
EMBEDDED = ROOT / "models" / "embedded" / "focale-tiny.safetensors"
LABELS = ("red apple", "blue heart", "acorn", "lemon", "plum", "mustard")
SIDE_PX = 64


def shape(label: str, style: str) -> np.ndarray:
    """(64, 64, 4) uint8 premultiplied RGBA: a disc, square or ring in a colour of its own."""
    number = LABELS.index(label)
    rows, columns = np.mgrid[-1 : 1 : SIDE_PX * 1j, -1 : 1 : SIDE_PX * 1j]
    radius = np.maximum(abs(rows), abs(columns)) if style == "flat" else np.hypot(rows, columns)
    inside = (radius < 0.8) & ((radius > 0.3) | (number % 2 == 0))
    colour = np.array([40 * number, 255 - 40 * number, 60 if style == "noto" else 200, 255])
    return (inside[..., None] * colour).astype(np.uint8)


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> StateFolder:
    """A state folder with six concepts in four styles, an untrained VAE and their 64 px latents."""
    torch.manual_seed(0)
    state = StateFolder(tmp_path_factory.mktemp("training"))
    concepts = [Concept(f"{i:x}", label, ("round", "thing"), "food", True) for i, label in enumerate(LABELS)]
    more = tuple(style for style in RECOGNITION_STYLES if style not in TRAINING_STYLES)
    folders: dict[str, tuple[Style, ...]] = {"art": (*TRAINING_STYLES, HELD_OUT_STYLE), "more": more}
    for folder, styles in folders.items():
        items = [(index, style) for index in range(len(concepts)) for style in styles]
        pixels = np.stack([shape(concepts[index].label, style) for index, style in items])
        write_art(state.file(folder), concepts, items, pixels)
    vae = new_vae().eval()
    vae.save_pretrained(state.file("vae"))
    art = load_art(state.file("art"))
    cache = encode_pictures(vae, art, art.pick(), height=64, width=64, rng=random.Random(0))
    save_cache(cache, state.file("latents", "64x64-0.safetensors"))
    return state


@pytest.fixture(scope="session")
def art(state: StateFolder) -> ArtSet:
    """The made-up art."""
    return load_art(state.file("art"))
